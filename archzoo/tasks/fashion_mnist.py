"""Fashion-MNIST: articles of clothing, 28 x 28 pixels (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747; MIT licence)."""

from pathlib import Path

from archzoo.tasks.files import Source
from archzoo.tasks.idx import idx_splits
from archzoo.tasks.options import choice
from archzoo.tasks.task import CRITERIA, ClassificationTask, register_task

SOURCE = Source(
    title="Fashion-MNIST",
    folder="fashion_mnist",
    # The first has no TLS; the SHA-256 makes that harmless.
    mirrors=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
    sha256={
        "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
)


@register_task("fashion_mnist")
class FashionMNIST(ClassificationTask):
    """Pixels standardised by mean 0.2860 and standard deviation 0.3530; splits of 55,000, 5,000 and 10,000 images.

    Args:
        val_size: Images held out for validation: the last of the 60,000 training images, as is usual.
        train_size: Images to train on: the first ones, for a quick run. None: all that validation leaves.
        standardize: Whether pixels are standardised; else they are from 0 to 1.
        loss: `cross_entropy`, or `margin`, for models whose scores are lengths of capsules.
        data_dir: Folder that holds `fashion_mnist/` with the four files; absent ones are downloaded there. None: the
            folder that the environment variable ARCHZOO_DATA names, else `archzoo` in the user's cache.
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
        mean, std = (0.2860, 0.3530) if standardize else (0.0, 1.0)
        self.pixel_range = (-mean / std, (1 - mean) / std)
        self.train, self.val, self.test = idx_splits(
            SOURCE, data_dir, val_size=val_size, train_size=train_size, mean=mean, std=std
        )
