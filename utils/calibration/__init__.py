"""What the confidence of a classifier is worth: logits and labels in, numbers out.

metrics        accuracy, proper scores and calibration errors of a whole split
selective      risk against coverage: what confidence is worth for choosing what to keep
temperature    the temperature of least NLL, and the NLL that it leaves
posthoc        temperature, vector and Dirichlet scaling, fitted on a validation split
sets           conformal sets, which hold the true class with a chance that is chosen
distributions  against known label distributions, and on foreign data
bootstrap      intervals of an ECE, a calibrated net's ECE, paired differences without bias
diagram        reliability diagrams
scores         what all of them accept: numpy arrays or tensors, checked

Imports nothing of the project and needs numpy and torch (bootstrap and distributions scipy, the
latter scikit-learn too, posthoc tqdm, diagram matplotlib).
"""
