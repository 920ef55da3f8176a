"""A teacher made ready for a student, before the run has a folder: all that may be refused is done.

What a teacher is, and how it answers its student, stands in utils/teachers/.
"""

from accelerate import Accelerator

from losses import DistillationLoss
from utils.data import Dataset
from utils.preflight import check_features, check_teacher
from utils.settings import Experiment
from utils.teachers.answers import Answers, StoredAnswers, answers_of
from utils.teachers.seen_views import SeenViews
from utils.teachers.settling import settle_nets, settle_stored
from utils.teachers.stored import StoredTeacher
from utils.teachers.teacher import Teacher


def prepare_teacher(
    teacher: Teacher,
    loss: DistillationLoss,
    experiment: Experiment,
    data: Dataset,
    accelerator: Accelerator,
) -> tuple[Answers, str]:
    """Its answers to a step, and lines on what it is worth, to be read before training.

    Nets are moved to the device. The temperature is found where a rule is asked for. Raises
    UserError where it cannot teach this student, or no cache can be made.
    """
    recipe = experiment.recipe
    if isinstance(teacher, StoredTeacher):
        answers = StoredAnswers(teacher, data, accelerator, seed=recipe.seed)
        seen = SeenViews(answers, data, recipe, accelerator)
        return answers, settle_stored(teacher, data, seen=seen, loss=loss)

    check_teacher(teacher, data)
    check_features(experiment.loss, recipe, teacher, data, accelerator)
    # Maps are those of a net's layers, which a folded one no longer has.
    is_folded = not experiment.loss.has_features
    teacher.to(accelerator.device, accelerator.mixed_precision, fold=is_folded)

    answers = answers_of(
        teacher, data, accelerator, seed=recipe.seed, cache=experiment.teacher.cache
    )
    about_teacher = settle_nets(
        teacher,
        data,
        accelerator,
        seen=SeenViews(answers, data, recipe, accelerator),
        batch_size=experiment.run.test_batch_size,
        loss=loss,
    )
    return answers, about_teacher
