"""Whatever teaches: where it comes from, what its logits are divided by, what it says of a batch.

teacher.py says what a teacher is. It has nets (nets.py), found by loading.py and weights.py, or it
is a file of logits (stored.py, logit_file.py). settling.py finds its temperature and what it is
worth, by seen_views.py among others; answers.py gives its logits to a step, and cache.py keeps them
for the next student. utils/preparing.py does all of this for a student, in order.
"""
