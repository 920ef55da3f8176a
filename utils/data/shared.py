"""A data set that several processes share: one downloads or decodes it, each trains on its part."""

from accelerate import Accelerator

from utils.data import Dataset, load_dataset
from utils.data.cutout import Cutout
from utils.data.mixing import Mixing
from utils.data.views import TrainLoader
from utils.program.processes import on_main
from utils.settings import DataChoice, Recipe


def load_data(choice: DataChoice, accelerator: Accelerator) -> Dataset:
    """The data set, on every process; the main one downloads while the others wait.

    Raises UserError on all of them.
    """
    loaded = []

    def load(is_main: bool) -> None:
        data = load_dataset(
            choice.dataset,
            choice.data_dir,
            split_seed=choice.split_seed,
            is_main=is_main,
            flip=choice.flip,
            image_size=choice.image_size,
            skip_unreadable=choice.skip_unreadable,
        )
        loaded.append(data)

    # The data set itself stays where it is: what on_main returns would be sent to all.
    on_main(accelerator, lambda: load(is_main=True))
    if not accelerator.is_main_process:
        load(is_main=False)
    return loaded[0]


def train_loader(data: Dataset, recipe: Recipe, accelerator: Accelerator) -> TrainLoader:
    """This process's share of the training views that a recipe asks for, on its device."""
    cutout = None
    if recipe.cutout:
        # The mean colour, which a net sees as zeros.
        cutout = Cutout(recipe.cutout, tuple(round(255 * level) for level in data.mean))
    return TrainLoader(
        data.train,
        batch_size=recipe.train_batch_size,
        seed=recipe.seed,
        device=accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        flip=data.flip,
        mixing=Mixing(recipe.mix, recipe.mix_alpha) if recipe.mix else None,
        cutout=cutout,
    )
