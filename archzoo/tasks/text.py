"""Tiny Shakespeare, character by character: 1,115,394 characters of plays, 65 distinct (Karpathy 2015, char-rnn)."""

from pathlib import Path

import torch
from torch import Tensor

from archzoo.tasks.files import Source, read_file
from archzoo.tasks.language import LONGEST, LanguageTask
from archzoo.tasks.options import whole_number
from archzoo.tasks.task import TensorSplit, register_task

FILE = "tinyshakespeare.txt"
SOURCE = Source(
    title="Tiny Shakespeare",
    folder=".",
    # It has another name there; what is behind the # is ours, and not sent.
    mirrors=(
        "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
        "/data/tinyshakespeare/input.txt#",
    ),
    sha256={FILE: "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
)


@register_task("text")
class Text(LanguageTask):
    """The next character of Tiny Shakespeare, at every position of a window of text.

    The first 90 % of the characters are for training, as is usual. Of the rest, which is usually all validation, the
    first half (5 % of the text, 55,770 characters) validates and the second half, which nobody looks at before the end,
    tests. Validation and test windows lie side by side, and every position of a window counts alike: the first ones
    have little text to go by, so that a longer context gives lower losses by itself. Compare at equal contexts.

    Inputs are (context,) characters, int64 from 0 to 64 in the order of their code points; targets are those one place
    further. The model gives (batch, context, 65) logits.

    Args:
        context: Characters of a window.
        stride: Characters from the start of a training window to that of the next. None: context, so that windows lie
            side by side and an epoch reads the text once; 1: every place starts a window.
        data_dir: Folder that holds `tinyshakespeare.txt`; absent, it is downloaded there (1.1 MB). None: the folder
            that the environment variable ARCHZOO_DATA names, else `archzoo` in the user's cache.
        seed: Not needed: the split is the same in every run.

    Attributes:
        characters: The 65 characters, in the order of their numbers.

    Raises:
        DatasetError: If the file is neither there nor to be downloaded, or is another.
        ValueError: If an option is out of range.
    """

    score = "bits_per_character"

    def __init__(self, *, context: int = 64, stride: int | None = None, data_dir: Path | None = None, seed: int = 0):
        super().__init__(data_dir=data_dir, seed=seed)
        whole_number("context", context, 1, LONGEST)
        if stride is not None:
            whole_number("stride", stride, 1, LONGEST)
        text = read_file(SOURCE, FILE, data_dir).decode("ascii")
        self.characters = "".join(sorted(set(text)))
        self.input_shape, self.output_size = (context,), len(self.characters)
        self.vocabulary = self.characters.encode("ascii")
        codes = torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8).long()
        train, val, test = self._ids[codes].tensor_split(cuts(len(text)))
        self.train = _windows(train, context, stride or context)
        self.val, self.test = _windows(val, context, context), _windows(test, context, context)


def cuts(length: int) -> list[int]:
    """Where validation and test begin in a text of this length."""
    return [length * 90 // 100, length * 95 // 100]


def _windows(characters: Tensor, context: int, stride: int) -> TensorSplit:
    """Views of the characters and of those one place further: windows that overlap take no memory."""
    windows = characters.unfold(0, context + 1, stride)
    return TensorSplit(windows[:, :-1], windows[:, 1:])
