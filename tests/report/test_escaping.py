"""Folders of strangers: texts are shown as they are in every format, and nothing outside is read or written."""

import csv
import io
import json
import os
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from rich.console import Console

from archzoo.report import compare_reports, console_table, load_comparison, write_report
from archzoo.training.progress import SweepProgress
from tests.report.test_pictures import png

ATTACKS = (
    '<script>alert("script")</script>',
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "]]><svg onload=alert(1)>",
    "</title></style></pre><b>",
    "[red]red[/red] [/nothing] [link=http://evil]x",
    "\x1b[31mred\x1b]8;;http://evil\x07 \x9b31m \r\n\x00",
    "\u202egnp.exe \ud800",
    r"\input{/etc/passwd} $x^2$ #1 % & _ { ~ \write18{ls}",
    "`x` ``` | a | [click](javascript:alert(1)) ![](http://evil/x.png) <!--",
    "{{ 7 * 7 }} {% raw %} ${x} %s {0}",
    "javascript:alert(1)",
    "=HYPERLINK(1)",
)
ALL = " ".join(ATTACKS)


def poisoned(value, text, path=()):
    """The same JSON with every text, and the keys of what users name, made hostile; what code looks at stays."""
    if isinstance(value, dict):
        free = path[-1:] in (("task_options",), ("versions",)) or path == ("config", "layer")
        out = {key: poisoned(inner, text, (*path, key)) for key, inner in value.items()}
        return out | {f"x{text}": text} if free else out
    if isinstance(value, list):
        return [poisoned(inner, text, path) for inner in value]
    kept = ("status", "mode", "match", "started", "ended")
    if (path[:1] != ("config",) and path[-1:] in [(key,) for key in kept]) or path == ("pictures", "drawn", "name"):
        return value
    return f"{value}{text}" if isinstance(value, str) else value


@pytest.fixture
def hostile(tmp_path, write):
    """A comparison all of whose texts are hostile."""
    root = tmp_path / f"evil {ATTACKS[1].replace('/', '')}"
    for i, (layer, seed) in enumerate([("linear", 0), ("linear", 1), ("kan", 0), ("kan", 1), ("aptx", 0), ("phm", 0)]):
        broken = layer in ("aptx", "phm")
        trouble = {"status": "failed", "error": "boom"} if layer == "aptx" else {"status": "diverged", "error": "boom"}
        if layer == "phm":
            trouble["diverged"] = {"step": 3, "module": "layers.0", "what": "loss"}
        folder = write(
            root / f"run{i}",
            layer=layer,
            seed=seed,
            score=0.9 + 0.01 * i,
            task_summary={"success": True, "sample": "text", "formula": "x"},
            task_options={"function": "f"},
            change={"pictures": {"drawn": [{"name": "maps", "caption": "caption"}], "failed": []}},
            **(trouble if broken else {}),
        )
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(poisoned(record, ALL)))
        metrics = (folder / "metrics.jsonl").read_text().replace("accuracy", json.dumps(f"accuracy{ALL}")[1:-1])
        (folder / "metrics.jsonl").write_text(metrics)
        (folder / "pictures").mkdir()
        (folder / "pictures" / "maps.png").write_bytes(png())
    return root


class Page(HTMLParser):
    """Tags, attributes and words of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


def assert_no_control_characters(text, but="\n\t"):
    found = {c for c in text if not c.isprintable() and c not in but}
    assert not found, found


def check_page(path):
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"script", "b", "iframe", "object", "embed", "link", "base", "form"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href", "action")]
    ours = re.compile(r"#[\w-]+|data:image/png;base64,[\w+/=]+|figures/[\w-]+\.svg|report\.\w+|scaling\.csv")
    assert all(ours.fullmatch(link) for link in links)
    assert "<script>alert" in "".join(page.words)
    assert_no_control_characters(text)
    assert not re.search(r"https?://(?!www\.w3\.org/|evil)", text)
    for attribute in re.findall(r'(?:style|class)="([^"]*)"', text):
        assert "alert" not in attribute
    return page


def test_no_text_of_a_run_is_code_in_any_format(hostile):
    page = check_page(write_report(hostile))
    assert page.tags >= {"svg", "table", "img"}

    for file in (hostile / "figures").iterdir():
        root = ET.parse(file).getroot()
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert not tags & {"script", "foreignObject", "image", "a", "iframe"}
        assert not [name for element in root.iter() for name in element.attrib if name.startswith("on")]

    markdown = (hostile / "report.md").read_text(encoding="utf-8")
    assert_no_control_characters(markdown)
    outside = re.sub(r"(`{1,})(?!`).*?(?<!`)\1(?!`)", "", markdown, flags=re.DOTALL)  # code is shown as it is
    assert not re.search(r"(?<!\\)<(?:script|img|svg|b|/)", outside)
    assert not re.search(r"(?<!\\)\]\((?!figures/|run\d+/)", outside)

    latex = (hostile / "report.tex").read_text(encoding="utf-8")
    assert_no_control_characters(latex)
    assert not re.search(r"\\(?:input|write|immediate|openout|def|catcode)\b", latex)
    bare = re.sub(r"\\[&%$#_{}]", "", re.sub(r"^%.*$", "", latex, flags=re.MULTILINE))
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert not re.search(r"[#%_]", bare)

    text = (hostile / "report.csv").read_text(encoding="utf-8")
    cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
    assert not [cell for cell in cells if cell[:1] in "=@+-" and not re.fullmatch(r"-?[\d.e-]+|", cell)]


def test_no_text_of_a_run_is_code_for_the_terminal(hostile):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system="truecolor", width=200)
    console.print(console_table(load_comparison(hostile)))
    own = re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue())  # rich's colours; `[31m` of a text is without its escape
    assert_no_control_characters(own)
    assert "http://evil" not in "".join(re.findall(r"\x1b\]8;[^\x07\x1b]*", shown.getvalue()))
    assert "[/nothing]" in own.replace("\n", "")


@pytest.mark.parametrize("bars", [True, False])
def test_the_progress_of_a_run_shows_its_texts_as_they_are(bars, capfd):
    progress = SweepProgress(2, bars=bars)
    record = {"name": f"x{ALL}", "status": "failed", "error": ALL}
    progress.start_run(record)
    progress.end_run(record)
    progress.skip_run(record)
    progress.close()
    told = capfd.readouterr().err
    assert "[/nothing]" in told
    assert "\x1b[31mred" not in told
    assert "\x1b]8" not in told


def test_two_hostile_comparisons_side_by_side(hostile, capsys):
    compare_reports(hostile, hostile)
    pages = list(hostile.rglob("compare*.html"))
    for page in pages:
        check_page(page)
    assert_no_control_characters(re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out))


# ---- folders


def test_links_out_of_the_folder_are_not_read_and_not_written_through(tmp_path, write):
    secret = tmp_path / "outside"
    secret.mkdir()
    record = write(tmp_path / "elsewhere" / "r", layer="kan", score=0.123456)
    (secret / "picture.png").write_bytes(png(level=99))
    (secret / "report.html").write_text("mine")
    root = tmp_path / "shown"
    good = write(root / "good", change={"pictures": {"drawn": [{"name": "a"}, {"name": "../../outside/picture"}]}})
    (good / "pictures").mkdir()
    (good / "pictures" / "a.png").symlink_to(secret / "picture.png")
    (root / "linked").symlink_to(record)
    (root / "half").mkdir()
    (root / "half" / "run.json").symlink_to(record / "run.json")
    (root / "text").mkdir()
    (root / "text" / "run.json").symlink_to("/etc/passwd")
    (good / "metrics.jsonl").unlink()
    (good / "metrics.jsonl").symlink_to(record / "metrics.jsonl")
    (root / "figures").symlink_to(secret)
    (root / "report.html").symlink_to(secret / "report.html")
    (root / f".report.html.{os.getpid()}.tmp").symlink_to(secret / "new")
    before = {path: path.read_bytes() for path in secret.iterdir()}

    text = write_report(root).read_text()
    comparison = load_comparison(root)
    assert {run.folder.name: run.status for run in comparison.runs} == {
        "good": "done",
        "linked": "failed",
        "half": "failed",
        "text": "failed",
    }
    assert all(run.metrics() == [] for run in comparison.runs)
    assert "<img" not in text
    assert "0.123456" not in text + (root / "report.csv").read_text()
    assert "root:" not in text
    assert {path: path.read_bytes() for path in secret.iterdir()} == before
    assert not (root / "figures").is_symlink()


def test_pipes_and_devices_are_not_waited_for(tmp_path, write):
    root = tmp_path / "shown"
    good = write(root / "good", change={"pictures": {"drawn": [{"name": "a"}, {"name": "b"}]}})
    (good / "metrics.jsonl").unlink()
    os.mkfifo(good / "metrics.jsonl")
    (good / "pictures").mkdir()
    os.mkfifo(good / "pictures" / "a.png")
    (good / "pictures" / "b.png").symlink_to("/dev/zero")
    (root / "pipe").mkdir()
    os.mkfifo(root / "pipe" / "run.json")
    write_report(root)
    assert [run.folder.name for run in load_comparison(root).runs] == ["good"]
