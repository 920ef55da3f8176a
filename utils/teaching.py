"""A teacher made ready for a student, before the run has a folder: all that may be refused is done.

What a teacher is stands in utils/teachers.py, how its student asks it in utils/asked_teachers.py.
"""

from accelerate import Accelerator

from losses import DistillationLoss
from utils.asked_teachers import AskedTeacher, ReadTeacher, asked_teacher
from utils.data import Dataset
from utils.preflight import check_features, check_teacher
from utils.seen_views import SeenViews
from utils.settings import Experiment
from utils.stored_teacher import StoredTeacher
from utils.teacher_settling import settle_nets, settle_stored
from utils.teachers import Teacher


def prepare_teacher(
    teacher: Teacher,
    loss: DistillationLoss,
    experiment: Experiment,
    data: Dataset,
    accelerator: Accelerator,
) -> tuple[AskedTeacher, str]:
    """The teacher as a step asks it, and lines on what it is worth, to be read before training.

    Nets are moved to the device. The temperature is found where a rule is asked for. Raises
    UserError where it cannot teach this student, or no cache can be made.
    """
    recipe = experiment.recipe
    if isinstance(teacher, StoredTeacher):
        ask = ReadTeacher(teacher, data, accelerator, seed=recipe.seed)
        seen = SeenViews(ask, data, recipe, accelerator)
        return ask, settle_stored(teacher, data, seen=seen, loss=loss)

    check_teacher(teacher, data)
    check_features(experiment.loss, recipe, teacher, data, accelerator)
    # Maps are those of a net's layers, which a folded one no longer has.
    is_folded = not experiment.loss.has_features
    teacher.to(accelerator.device, accelerator.mixed_precision, fold=is_folded)

    ask = asked_teacher(
        teacher, data, accelerator, seed=recipe.seed, cache=experiment.teacher.cache
    )
    about_teacher = settle_nets(
        teacher,
        data,
        accelerator,
        seen=SeenViews(ask, data, recipe, accelerator),
        batch_size=experiment.run.test_batch_size,
        loss=loss,
    )
    return ask, about_teacher
