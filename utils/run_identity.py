"""What a run is: what names its net and its folder, and the settings that decide its numbers."""

from accelerate import Accelerator

from models.own import identity_of_net
from utils.data import Dataset
from utils.program.files import safe_name
from utils.run_files import label_of
from utils.settings import Experiment
from utils.teachers.teacher import Teacher


def identity_of(experiment: Experiment, data: Dataset, teacher: Teacher | None) -> dict:
    """What a net is: stands in every checkpoint and result, and names the run folder.

    Its `label` says how it was trained, but for the seeds: `FL+MDCA_gamma=3_beta=1`.
    """
    recipe = experiment.recipe
    parameters = dict(experiment.loss.parameters)
    if recipe.mix:
        parameters[recipe.mix] = recipe.mix_alpha
    label = label_of(experiment.loss.name, parameters)
    if experiment.loss.feature_layer:
        label = f"{label}_feature_layer={safe_name(experiment.loss.feature_layer)}"
    if teacher is not None:
        label = f"{label}_from_{teacher.model}_{teacher.label}"
    return {
        **identity_of_net(recipe.model),
        "seed": recipe.seed,
        "split_seed": data.split_seed,
        "dataset": data.name,
        "mean": list(data.mean),
        "std": list(data.std),
        "num_classes": data.num_classes,
        "flip": data.flip,
        "fingerprint": data.fingerprint,
        "loss": experiment.loss.name,
        "loss_parameters": parameters,
        "label": label,
    }


def settings_of(
    experiment: Experiment, identity: dict, accelerator: Accelerator, teacher: Teacher | None
) -> dict:
    """What the result depends on: a run that was started with other settings is refused."""
    settings = {
        **experiment.recipe.settings(),
        **identity_of_net(experiment.recipe.model),
        "split_seed": experiment.data.split_seed,
        "fingerprint": identity["fingerprint"],
        "label": identity["label"],
        "mean": identity["mean"],
        "std": identity["std"],
        "flip": identity["flip"],
        "mixed_precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
    }
    if experiment.loss.feature_layer:
        settings["feature_layer"] = experiment.loss.feature_layer
    if teacher is not None:
        # Where it lies and what it is said to be change no number.
        settings["teacher"] = {
            key: value for key, value in teacher.identity.items() if key not in ("path", "loss")
        }
    return settings


def run_name(experiment: Experiment, identity: dict, teacher: Teacher | None) -> str:
    """`NLL_seed=42`; of a student whose teacher has another seed, that one, too."""
    seed = experiment.recipe.seed
    words = [identity["label"]]
    if teacher is not None and teacher.identity["seed"] not in (None, seed):
        words.append(f"teacher-seed={teacher.identity['seed']}")
    words.append(f"seed={seed}")
    if experiment.run.exp_name:
        words.append(experiment.run.exp_name)
    return safe_name("_".join(words))
