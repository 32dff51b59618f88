"""MNIST: handwritten digits, 28 x 28 pixels (LeCun, Cortes, Burges 1998; CC BY-SA 3.0)."""

from pathlib import Path

from archzoo.tasks.files import Source
from archzoo.tasks.idx import idx_splits
from archzoo.tasks.options import choice
from archzoo.tasks.task import CRITERIA, ClassificationTask, register_task

SOURCE = Source(
    title="MNIST",
    folder="mnist",
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    sha256={
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
)


@register_task("mnist")
class MNIST(ClassificationTask):
    """Pixels standardised by mean 0.1307 and standard deviation 0.3081; splits of 55,000, 5,000 and 10,000 images.

    Args:
        val_size: Images held out for validation: the last of the 60,000 training images, as is usual.
        train_size: Images to train on: the first ones, for a quick run. None: all that validation leaves.
        standardize: Whether pixels are standardised; else they are from 0 to 1.
        loss: `cross_entropy`, or `margin`, for models whose scores are lengths of capsules.
        data_dir: Folder that holds `mnist/` with the four files; absent ones are downloaded there. None: the folder
            that the environment variable ARCHZOO_DATA names, else `archzoo` in the user's cache.
        seed: Not needed: the split is the same in every run.

    Raises:
        DatasetError: If a file is neither there nor to be downloaded, or is not the official one.
        ValueError: If a size is out of range, or there is no such loss.
    """

    input_shape = (1, 28, 28)
    output_size = 10

    def __init__(
        self,
        *,
        val_size: int = 5000,
        train_size: int | None = None,
        standardize: bool = True,
        loss: str = "cross_entropy",
        data_dir: Path | None = None,
        seed: int = 0,
    ):
        super().__init__(data_dir=data_dir, seed=seed)
        self.criterion = choice("loss", loss, CRITERIA)
        mean, std = (0.1307, 0.3081) if standardize else (0.0, 1.0)
        self.pixel_range = (-mean / std, (1 - mean) / std)
        self.train, self.val, self.test = idx_splits(
            SOURCE, data_dir, val_size=val_size, train_size=train_size, mean=mean, std=std
        )
