"""What a run is made from, as frozen values: data, recipe, loss, teacher, and how it is run.

`utils/options.py` makes them from a command line; a program or a notebook makes them directly. The
defaults of the command line are those written here.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class DataChoice:
    """Which images, and how they are split and seen."""

    dataset: str = "cifar10"
    data_dir: str = "data"
    split_seed: int = 0
    flip: bool | None = None  # whether mirrored views are drawn; None: as suits the data set
    image_size: int | None = None  # pixels; of a folder of images
    skip_unreadable: bool = False  # of a folder of images

    @classmethod
    def of(cls, arguments: Mapping) -> "DataChoice":
        """From the values of a command line's flags, or those that a run's config.json has."""
        return cls(
            dataset=arguments["dataset"],
            data_dir=arguments["data_dir"],
            split_seed=arguments["split_seed"],
            flip=arguments["flip"],
            image_size=arguments["image_size"],
            skip_unreadable=arguments["skip_unreadable"],
        )


@dataclass(frozen=True)
class LossChoice:
    """A loss or a distillation by its canonical name, with the values that build it."""

    name: str = "NLL"
    parameters: dict[str, float] = field(default_factory=dict)
    feature_layer: str | None = None  # layer of both nets, or STUDENT:TEACHER; None: the term's own

    @property
    def base(self) -> str:
        """The name without its term: of a distillation the one of logits alone."""
        return self.name.partition("+")[0]

    @property
    def has_features(self) -> bool:
        """Whether a distillation has a term on features."""
        return "+" in self.name


# Fields of a Recipe that runs of older versions of this code lack.
NEWER = ("optimizer", "ema", "cutout", "patience")


@dataclass(frozen=True)
class Recipe:
    """A net and how it is trained: with the data and the loss it decides the weights."""

    model: str = "resnet20"
    epochs: int = 160
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    scheduler: str = "multistep"
    schedule_steps: tuple[int, ...] = ()  # epochs
    lr_decay_factor: float = 0.1
    warmup: int = 0  # steps
    train_batch_size: int = 128  # per process
    mix: str | None = None
    mix_alpha: float = 1.0
    seed: int = 42
    select: str = "top1"
    sync_bn: bool = False
    ema: float | None = None  # of the weights; None: the net itself is evaluated
    cutout: int | None = None  # pixels
    patience: int | None = None  # epochs; None: all are trained

    def jsonable(self) -> dict:
        """All of it as JSON gives it back: with lists, not tuples."""
        return asdict(self) | {"schedule_steps": list(self.schedule_steps)}

    def settings(self) -> dict:
        """What tells two runs apart that bear one name, ready for JSON.

        How images are mixed is a part of the name. Runs of older versions do not name what is
        NEWER: there it is the default.
        """
        settings = self.jsonable()
        del settings["mix"], settings["mix_alpha"]
        for name in NEWER:
            if settings[name] == getattr(Recipe, name):
                del settings[name]
        return settings


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher comes from, and what its logits are divided by.

    That is nets at `paths`, or a file of logits, which reads `loss` and `temperature` alone.
    """

    paths: tuple[str, ...] = ()
    models: tuple[str | None, ...] = (None,)  # one for all paths, or one each
    loss: str | None = None
    select: str = "best"
    norm: str | None = None
    key: str | None = None
    size: int | None = None  # pixels
    temperature: float | str = 1.0  # or a rule that finds it: "auto", "views"
    accuracy: float | None = None  # a fraction; what "views" matches, if not that on validation
    cache: str | None = None
    logits: str | None = None

    @classmethod
    def of(cls, arguments: Mapping) -> "TeacherSource":
        """From the values of a command line's flags, or those that a run's config.json has."""
        return cls(
            paths=tuple(arguments["teacher_path"] or ()),
            models=tuple(arguments["teacher"] or [None]),
            loss=arguments["teacher_loss"],
            select=arguments["teacher_select"],
            norm=arguments["teacher_norm"],
            key=arguments["teacher_key"],
            size=arguments["teacher_size"],
            temperature=arguments.get("teacher_temperature", cls.temperature),
            accuracy=arguments.get("teacher_accuracy"),
            cache=arguments["teacher_cache"],
            logits=arguments.get("teacher_logits"),
        )

    @property
    def rule(self) -> str | None:
        """What finds the temperature; None where it is a number."""
        return self.temperature if isinstance(self.temperature, str) else None

    @property
    def number(self) -> float | None:
        """The temperature; None where a rule finds it."""
        return None if self.rule else self.temperature


@dataclass(frozen=True)
class RunChoice:
    """Where a run lies and how it is carried out: what may change a weight's last bits, no more."""

    checkpoint: str = "checkpoint"
    exp_name: str | None = None
    overwrite: bool = False
    log_with: str | None = None
    test_batch_size: int | None = None
    step: str = "auto"
    deterministic: bool = False


@dataclass(frozen=True)
class Experiment:
    """All of it. `arguments` are the values of every flag, which the run's config.json keeps;
    `notes` are lines about flags that have no effect, which the run says at its start. `words` are
    the script and its flags as they were given."""

    data: DataChoice
    recipe: Recipe
    loss: LossChoice
    run: RunChoice
    arguments: dict
    teacher: TeacherSource | None = None
    notes: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
