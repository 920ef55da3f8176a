"""A data set that several processes load, of which one downloads or decodes it."""

from accelerate import Accelerator

from utils.data import Dataset, load_dataset
from utils.program.processes import on_main
from utils.settings import DataChoice


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
