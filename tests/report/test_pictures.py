"""The section 'Pictures': what the best run of each contestant drew, inside the page, and only if it drew anything."""

import base64
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from archzoo.report import load_comparison, write_report
from archzoo.report import pictures as module
from archzoo.report.pictures import LARGEST, MOST, drawings

HOSTILE = '<script>alert(1)</script> & "x" `y` \x00\x1b[31m |é'


def png(width=2, height=2, level=0):
    """A grey PNG."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (width, height), level).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def add(tmp_path, write):
    """`add(layer, seed, score, files, entries)` makes a run with pictures in one comparison, whose path it returns.

    `entries` is what its record says of the pictures: by default that they are there.
    """

    def add(layer, seed, score, files=None, entries=None, **common):
        folder = tmp_path / "shown" / f"{layer}{seed}"
        if entries is None and files is not None:
            entries = [{"name": name, "caption": f"{name} of {folder.name}"} for name in files]
        change = None if files is None else {"pictures": {"drawn": entries, "failed": []}}
        write(folder, layer=layer, seed=seed, score=score, change=change, **common)
        if files is not None:
            (folder / "pictures").mkdir()
            for name, data in files.items():
                (folder / "pictures" / f"{name}.png").write_bytes(data)
        return folder.parent

    return add


class Page(HTMLParser):
    """The figures of a page, its words and tags."""

    def __init__(self, text):
        super().__init__()
        self.images, self.tags, self.words, self.classes = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "figure":
            self.classes.append(dict(attrs).get("class"))

    def handle_data(self, data):
        self.words.append(data)


def page_of(folder):
    return write_report(folder).read_text(encoding="utf-8")


def bytes_of(image):
    head, _, data = image["src"].partition(",")
    assert head == "data:image/png;base64"
    return base64.b64decode(data, validate=True)


def test_the_best_run_of_each_contestant_is_shown_and_those_of_one_name_together(add):
    a, b, c = (png(level=level) for level in (10, 20, 30))
    for layer, seed, score, files in [
        *(("kan", 0, 2.5, {"maps": a, "more": a}), ("kan", 1, 2.4, {"maps": b, "more": c})),
        *(("linear", 0, 2.6, {"maps": c, "more": b}), ("linear", 1, 2.7, {"maps": a})),
        *(("mamba", 0, 2.0, None), ("nau", 0, 2.0, {})),
    ]:
        folder = add(layer, seed, score, files, metric="rmse", mode="min")
    found = drawings(load_comparison(folder))
    assert [(d.name, d.label, d.caption, d.file, d.data) for d in found] == [
        ("maps", "kan, seed 1", "maps of kan1", "kan1/pictures/maps.png", b),
        ("maps", "linear, seed 0", "maps of linear0", "linear0/pictures/maps.png", c),
        ("more", "kan, seed 1", "more of kan1", "kan1/pictures/more.png", c),
        ("more", "linear, seed 0", "more of linear0", "linear0/pictures/more.png", b),
    ]


def test_a_run_without_pictures_is_passed_over(add):
    add("kan", 0, 0.9)
    add("kan", 1, 0.8, {"maps": png()}, status="failed")
    folder = add("kan", 2, 0.7, {"maps": png()})
    add("kan", 3, 0.6, {"maps": png()})
    assert [d.label for d in drawings(load_comparison(folder))] == ["kan, seed 2"]


def test_the_page_holds_the_pictures_and_shows_their_captions_escaped(add):
    data = png(90, 30)
    folder = add("kan", 0, 0.9, {"loss_maps": data}, [{"name": "loss_maps", "caption": HOSTILE}])
    add("linear", 0, 0.8, {"loss_maps": png(60, 30)})
    text = page_of(folder)
    page = Page(text)
    assert text.count(">Pictures<") == 1
    assert "script" not in page.tags
    assert [bytes_of(image) for image in page.images] == [data, png(60, 30)]
    assert [(i["width"], i["height"]) for i in page.images] == [("90", "30"), ("60", "30")]
    assert [i["alt"] for i in page.images] == ["Loss maps: kan, seed 0", "Loss maps: linear, seed 0"]
    assert page.classes[-2:] == ["wide", None]
    shown = HOSTILE.replace("\x00", " ").replace("\x1b", "")
    assert f"kan, seed 0: {' '.join(shown.split())}" in page.words
    assert "linear, seed 0: loss_maps of linear0" in page.words
    assert text == page_of(folder)


def test_markdown_links_the_files(add):
    folder = add("kan", 0, 0.9, {"loss_maps": png()}, [{"name": "loss_maps", "caption": HOSTILE}])
    (folder / "kan0").rename(folder / "a run (1)")
    page_of(folder)
    report = (folder / "report.md").read_text(encoding="utf-8")
    section = report.partition("\n## Pictures\n\n")[2].partition("\n## ")[0]
    (link,) = re.findall(r"^!\[Loss maps: kan, seed 0\]\((\S+)\)$", section, re.MULTILINE)
    assert (folder / unquote(link)).read_bytes() == png()
    assert '\nkan, seed 0: \\<script>alert(1)\\</script> & "x" \\`y\\`' in section


def test_what_is_no_picture_of_the_run_is_not_shown(add, tmp_path):
    files = {"good": png(), "fake": b"<svg onload='alert(1)'>", "cut": png()[:20], "large": png() + bytes(LARGEST)}
    names = ["good", "fake", "cut", "large", "gone", "../../spare", "../x/y", "A", "", 5, None, ["good"]]
    entries = [*({"name": name, "caption": "c"} for name in names), "text", None, {"caption": "c"}]
    (tmp_path / "spare.png").write_bytes(png())
    found = drawings(load_comparison(add("kan", 0, 0.9, files, entries)))
    assert [(d.name, d.caption) for d in found] == [("good", "c")]


@pytest.mark.parametrize("entries", [5, "text", {"name": "a"}, []], ids=str)
def test_a_record_that_says_something_else_is_of_no_picture(add, entries):
    folder = add("kan", 0, 0.9, {"a": png()}, entries)
    assert drawings(load_comparison(folder)) == ()
    assert ">Pictures<" not in page_of(folder)


@pytest.mark.parametrize("caption", [None, 5, ["x"]], ids=str)
def test_a_caption_may_be_missing_or_something_else(add, caption):
    (drawn,) = drawings(load_comparison(add("kan", 0, 0.9, {"a": png()}, [{"name": "a", "caption": caption}])))
    assert drawn.caption == ("" if caption is None else str(caption))


def test_a_run_has_no_more_than_so_many(add):
    folder = add("kan", 0, 0.9, {f"p{i:02}": png() for i in range(MOST + 3)})
    assert [d.name for d in drawings(load_comparison(folder))] == [f"p{i:02}" for i in range(MOST)]


def test_what_the_page_has_no_room_for_it_shows_from_the_runs_folder(add, monkeypatch):
    size = len(png())
    for task in ("a", "b"):
        for layer in ("kan", "linear", "nau"):
            folder = add(f"{layer}-{task}", 0, 0.9, {"maps": png()}, task=task)
    monkeypatch.setattr(module, "EMBEDDED", 0)
    monkeypatch.setattr("archzoo.report.sections.EMBEDDED", 4 * size + 1)
    images = Page(page_of(folder)).images
    assert [image["src"].startswith("data:") for image in images] == [True] * 4 + [False] * 2
    assert all((folder / image["src"]).read_bytes() == png() for image in images[4:])


def test_of_many_runs_only_the_best_are_read(add, monkeypatch):
    for layer in ("kan", "linear"):
        for seed in range(20):
            folder = add(layer, seed, seed / 20, {"maps": png()})
    read = []
    monkeypatch.setattr(module, "_entries", lambda run, entries=module._entries: read.append(run.id) or entries(run))
    drawings(load_comparison(folder))
    assert read == ["kan19", "linear19"]


def test_without_pictures_there_is_no_such_section(build):
    folder = build({"linear": [0.9, 0.91], "kan": [0.92, 0.93]})
    assert "<img" not in page_of(folder)
    assert ">Pictures<" not in page_of(folder)
    assert "## Pictures" not in (folder / "report.md").read_text(encoding="utf-8")
