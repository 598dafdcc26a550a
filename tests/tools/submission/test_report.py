"""The report's page against the numbers it was made from."""

import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from detcore import UserError
from tests.tools.submission import made
from tools.submission import compare, report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell", "chromium-headless-shell")
LOSSES, METRICS = [2.0, 1.5, 0.5, 0.25], [0.1, 0.5]
VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module")
def tool():
    return report


def lines(*, target=0.4, end=True) -> list[dict]:
    config = {"target_map": target, "epochs": 2, "lr": "<script>alert(1)</script>"}
    found = [
        {"kind": "start", "benchmark": "retinanet", "config": config, "environment": {"torch": "2"}, "notes": ["N."]}
    ]
    for i, loss in enumerate(LOSSES):
        terms = {"cls": loss / 4, "box": loss * 3 / 4}
        fields = {"step": 10 * (i + 1), "epoch": 1 + i // 2, "time_s": 5.0 * (i + 1), "loss": loss, "terms": terms}
        found.append({"kind": "step", **fields, "lr": 0.1, "images_per_s": 8.0 + i, "data_wait": 0.0})
    for i, metric in enumerate(METRICS):
        metrics = {"AP": metric, "AP50": metric + 0.2, "per_class": {"star": metric, "ring": -1.0}}
        found.append({"kind": "eval", "step": 20 * (i + 1), "epoch": i + 1, "time_s": 21.0 + i, "metrics": metrics})
    if end:
        seconds = {"start_up": 1.0, "data": 2.0, "train": 17.0, "evaluation": 2.0, "checkpoint": 0.5}
        found.append({"kind": "end", "status": "success", "time_s": 22.5, "seconds": seconds})
    return found


def make(folder: Path, found: list[dict], gallery: bool = False) -> Path:
    (folder / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    if gallery:
        (folder / "gallery").mkdir()
        Image.new("RGB", (40, 30), (9, 99, 9)).save(folder / "gallery/0.jpg")
        box = {"box": [4.0, 5.0, 20.0, 25.0], "label": "star & <b>"}
        entry = {
            "image": "gallery/0.jpg",
            "width": 40,
            "height": 30,
            "truth": [box],
            "detections": [{**box, "score": 0.875}],
        }
        (folder / "gallery.json").write_text(json.dumps([entry]))
    return folder


def page(tool, folder: Path) -> str:
    assert tool.main([str(folder)]) == 0
    return (folder / "report.html").read_text()


class Tags(HTMLParser):
    """Fails where a tag is closed that is not the last one opened."""

    def __init__(self):
        super().__init__()
        self.open, self.names, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data


def console(tool, folder: Path, capsys) -> str:
    """What the program prints: five lines."""
    page(tool, folder)
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 5
    return said


def parse(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    return tags


def values_of(text: str, name: str) -> list[float]:
    """A line of a chart read back through the axis labels, as an eye would."""
    figure = next(f for f in re.findall(r"<figure.*?</figure>", text, re.S) if f'data-name="{name}"' in f)
    path = re.search(rf'<path(?=[^>]*data-name="{re.escape(name)}")[^>]*\bd="M([^"]+)"', figure)[1]
    ticks = sorted((float(at), float(y)) for y, at in re.findall(r'data-y="([^"]+)" data-at="([^"]+)"', figure))
    (low_at, low), (high_at, high) = ticks[0], ticks[-1]
    heights = [float(point.split(",")[1]) for point in path.split("L")]
    return [low + (h - low_at) * (high - low) / (high_at - low_at) for h in heights]


def test_the_charts_show_the_numbers(tool, tmp_path):
    text = page(tool, make(tmp_path, lines()))
    assert values_of(text, "total") == pytest.approx(LOSSES, abs=0.02)
    assert values_of(text, "cls") == pytest.approx([loss / 4 for loss in LOSSES], abs=0.02)
    assert values_of(text, "AP50") == pytest.approx([m + 0.2 for m in METRICS], abs=0.01)


def test_the_best_of_two_metrics_is_nearest_to_both_targets(tool, tmp_path, capsys):
    """As best.pt is: not the one with the higher AP of boxes alone."""
    found = lines(target=0.4)
    found[0]["targets"] = {"AP": 0.4, "segm_AP": 0.3}
    evaluations = [line for line in found if line["kind"] == "eval"]
    for line, (box, mask) in zip(evaluations, ((0.39, 0.1), (0.38, 0.29)), strict=True):
        line["metrics"] |= {"AP": box, "segm_AP": mask}
    said = console(tool, make(tmp_path, found), capsys)
    assert "AP of the best epoch 0.3800 after epoch 2" in said


def test_a_run_of_proposals_shows_their_recall(tool, tmp_path):
    found = lines(target=None)
    found[0]["targets"] = {"AR@1000": None}
    for line in found:
        if line["kind"] == "eval":
            ap = line["metrics"]["AP"]
            line["metrics"] = {"AR@100": ap / 2, "AR@1000": ap, "per_class": {}}
    text = page(tool, make(tmp_path, found))
    assert values_of(text, "AR of 1000 proposals") == pytest.approx(METRICS, abs=0.01)
    assert values_of(text, "AR of 100 proposals") == pytest.approx([m / 2 for m in METRICS], abs=0.01)
    said = parse(text).text
    assert "Best AR@10000.5000after epoch 2" in said.replace("\n", "") and "AR on the validation images" in said


def test_points_stand_over_their_steps(tool, tmp_path):
    text = page(tool, make(tmp_path, lines()))
    figure = re.search(r"<figure><h2>Loss.*?</figure>", text, re.S)[0]
    (zero, low), *_, (last, high) = [
        (float(value), float(at)) for value, at in re.findall(r'data-x="([^"]+)" data-at="([^"]+)"', figure)
    ]
    across = [float(p.split(",")[0]) for p in re.search(r'd="M([^"]+)" class="line c0"', figure)[1].split("L")]
    assert [zero + (x - low) * (last - zero) / (high - low) for x in across] == pytest.approx([10, 20, 30, 40], abs=0.1)
    assert "step 30, epoch 2\ntotal 0.5000\ncls 0.1250\nbox 0.3750" in parse(figure).text


def test_the_bar_of_time_has_the_seconds_as_lengths(tool, tmp_path):
    text = page(tool, make(tmp_path, lines()))
    bar = re.search(r'<svg[^>]*class="stack".*?</svg>', text, re.S)[0]
    lengths = [float(w) for w in re.findall(r'width="([^"]+)" height="40"', bar)]
    seconds = [1.0, 17.0, 2.0, 2.0, 0.5, 22.5 - 21.5]  # the last: what the clock saw beyond the four kinds
    assert lengths == pytest.approx([1000 * s / sum(seconds) for s in seconds], abs=0.02)


def test_boxes_lie_where_the_gallery_says(tool, tmp_path):
    text = page(tool, make(tmp_path, lines(), gallery=True))
    place = 'x="4.0" y="5.0" width="16.0" height="20.0"'
    assert re.search(rf'<rect {place} class="truth">', text)
    assert re.search(rf'<rect {place} stroke="#[0-9a-f]+" class="found">', text)
    assert 'viewBox="0 0 40 30"' in text


def test_words_in_a_crowd_do_not_lie_on_each_other(tool):
    found = [(4.0, 20.0 + i / 10, 60.0, 80.0, "star", 0.9 - i / 100) for i in range(20)]
    entry = {"image": "0.jpg", "data": "", "size": (100.0, 100.0), "truth": [], "detections": found}
    drawn = tool.picture(entry, {"star": "#fff"})
    heights = sorted(float(y) for y in re.findall(r'<text x="[^"]+" y="([^"]+)"', drawn))
    assert drawn.count('class="found"') == 20 and "star 0.90</text>" in drawn
    assert len(heights) > 1 and all(b - a > 4.2 for a, b in itertools.pairwise(heights))


def test_the_words_of_a_picture_name_its_true_classes_and_stay_inside(tool):
    truth = [(0.0, 0.0, 9.0, 9.0, label) for label in ("star", "ring", "star")]
    entry = {"image": "0.jpg", "data": "", "size": (100.0, 100.0), "truth": truth,
             "detections": [(0.0, 20.0, 60.0, 80.0, "ring", 0.9)]}  # fmt: skip
    drawn = tool.picture(entry, {"ring": "#fff"})
    assert "3 true (star, ring), 1 detection</p>" in drawn
    assert float(re.search(r'<text x="([^"]+)"', drawn)[1]) >= 0.5, "its outline would be cut at the edge"
    assert "0 true, 0 detections</p>" in tool.picture(entry | {"truth": [], "detections": []}, {})


def test_the_page_is_whole_and_needs_nothing_else(tool, tmp_path, capsys):
    text = page(tool, make(tmp_path, lines(), gallery=True))
    tags = parse(text)
    assert not re.search(r"https?://(?!www\.w3\.org)|src=\"(?!data:)|<script|<link|@import", text)
    assert "Target AP 0.4 reached" in tags.text and "star & <b> 0.88" in tags.text and "N." in tags.text
    assert "data:image/jpeg;base64," in text and "stroke-dasharray" in text
    said = capsys.readouterr().out
    assert "Target AP 0.4 reached" in said and "best AP 0.5000 after epoch 2" in said and "report.html" in said


def test_a_run_without_an_end_says_so(tool, tmp_path):
    make(tmp_path, lines(end=False, target=0.9))
    with (tmp_path / "progress.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # killed while writing
    tags = parse(page(tool, tmp_path))
    assert "No end recorded" in tags.text and "step 40" in tags.text


def test_a_run_below_its_target_says_so(tool, tmp_path):
    found = lines(target=0.9)
    found[-1]["status"] = "aborted"
    assert "Target AP 0.9 not reached in 2 epochs" in parse(page(tool, make(tmp_path, found))).text


def test_a_resumed_run_is_one_run(tool, tmp_path):
    first = [line for line in lines(end=False) if line["kind"] != "eval"]
    tags = page(tool, make(tmp_path, [*first, *lines()]))
    assert values_of(tags, "total") == pytest.approx(LOSSES, abs=0.02)  # the repeated steps count once


def test_a_run_before_its_first_step_has_a_page(tool, tmp_path):
    tags = parse(page(tool, make(tmp_path, lines()[:1])))
    assert "No evaluation was recorded" in tags.text and "No training step was recorded" in tags.text


def test_a_run_resumed_behind_a_cut_line_is_read(tool, tmp_path):
    first, second = lines(end=False)[:4], lines()
    text = "".join(json.dumps(line) + "\n" for line in first) + '{"kind": "step", "st'
    make(tmp_path, second)
    (tmp_path / "progress.jsonl").write_text(text + (tmp_path / "progress.jsonl").read_text())
    tags = parse(page(tool, tmp_path))
    assert "sum of the run's 2 parts" in tags.text and "parts that ended without a record15.0 s" in tags.text
    assert "left out of progress.jsonl, because unreadable or cut: 1 line" in tags.text


def test_an_aborted_run_says_where(tool, tmp_path):
    found = lines(target=0.9)
    found = [*found[:4], {**found[-1], "status": "aborted"}]
    tags = parse(page(tool, make(tmp_path, found)))
    assert "Aborted after step 30; target AP 0.9 not reached" in tags.text


def test_the_time_is_that_of_the_log(tool, tmp_path, capsys):
    make(tmp_path, lines())
    events = [("run_start", 1_000_000), ("run_stop", 1_083_000)]
    log = [
        ":::MLLOG " + json.dumps({"key": key, "time_ms": time, "value": None, "metadata": {}}) for key, time in events
    ]
    (tmp_path / "result_0.txt").write_text("\n".join([*log, ':::MLLOG {"key": "sta']))
    assert "time to train 1:23 (from RUN_START to RUN_STOP in the log)" in console(tool, tmp_path, capsys)
    assert "left out of result_0.txt, because unreadable or cut: 1 line" in (tmp_path / "report.html").read_text()


def test_a_gallery_of_another_run_or_cut_is_left_out(tool, tmp_path):
    make(tmp_path, lines(), gallery=True)
    event = {"key": "run_start", "time_ms": (tmp_path / "gallery.json").stat().st_mtime * 1000 + 60_000, "value": None}
    event["metadata"] = {}
    (tmp_path / "result_0.txt").write_text(":::MLLOG " + json.dumps(event))
    assert "gallery.json is older than this run" in page(tool, tmp_path)
    (tmp_path / "result_0.txt").unlink()
    (tmp_path / "gallery.json").write_text((tmp_path / "gallery.json").read_text()[:50])
    text = page(tool, tmp_path)
    assert "the gallery can&#x27;t be read and is left out" in text and "data:image" not in text


@pytest.mark.parametrize(
    ("content", "said"), [('DLLL {"data": {}}\n', "has dllogger's lines"), ("Hello\n", "holds no MLPerf")]
)
def test_a_file_without_events_is_refused(tool, tmp_path, content, said):
    (tmp_path / "log.json").write_text(content)
    with pytest.raises(UserError, match=rf"log\.json: {said}.*name a log, or the --output-dir of a training"):
        tool.main([str(tmp_path / "log.json")])


def test_a_folder_that_is_not_there_is_refused(tool, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        tool.main([str(tmp_path / "nothing")])


@pytest.mark.parametrize("content", [None, "", "no json\n", "[1, 2]\n"])
def test_a_folder_without_a_run_is_refused(tool, tmp_path, content):
    if content is not None:
        (tmp_path / "progress.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"progress\.jsonl"):
        tool.main([str(tmp_path)])


def test_a_page_from_a_log_alone(tool, tmp_path, capsys):
    """Also with the prefixes of srun: curve, target, public runs, and the time by the log's intervals."""
    log = made.write_log(tmp_path / "result_3.txt", prefix="0: ", minutes=40, init_s=30)
    assert tool.main([str(log)]) == 0
    text = (tmp_path / "result_3.html").read_text()
    tags = parse(text)
    assert "Target AP 0.34 reached" in tags.text and "retinanet on OpenImages-MLPerf" in tags.text
    assert values_of(text, "AP (IoU 0.50 to 0.95)") == pytest.approx(made.CURVE[:4], abs=0.005)
    assert "mAP 0.240 after epoch 1, 0.217 to 0.252 in 495 public runs of this batch size" in tags.text
    assert 'class="band"' in text and "0:40:00" not in tags.text and "40:00" in tags.text
    lengths = [float(w) for w in re.findall(r'width="([^"]+)" height="40"', text)]
    train, evaluation = 40 * 60 * 0.9, 40 * 60 * 0.09  # of each epoch 0.9 are steps and 0.09 an evaluation
    seconds = [30, train, evaluation, 40 * 60 - train - evaluation]
    assert lengths == pytest.approx([1000 * s / sum(seconds) for s in seconds], abs=0.1)
    assert "1,170,301 training images" in tags.text and f"{1170301 * 4 / train:,.1f}" in tags.text
    capsys.readouterr()


def test_an_evaluation_beside_the_next_epoch_is_training(tool, tmp_path, capsys):
    """Steps from 0 to 100 s and from 100 to 200 s, an evaluation from 90 to 150 s: no second counts twice."""
    spans = {"run": (0, 210), "epoch": (0, 100), "eval": (90, 150)}
    events = [(f"{name}_start", begin) for name, (begin, _) in spans.items()]
    events += [("epoch_stop", 100), ("epoch_start", 100), ("eval_stop", 150), ("epoch_stop", 200), ("run_stop", 210)]
    events = sorted(events, key=lambda one: one[1])
    status = {"status": "success"}
    found = [
        {"key": k, "time_ms": 1000 * t, "value": None, "metadata": status if k == "run_stop" else {}} for k, t in events
    ]
    (tmp_path / "a.txt").write_text(made.text(found))
    assert tool.main([str(tmp_path / "a.txt")]) == 0
    lengths = [float(w) for w in re.findall(r'width="([^"]+)" height="40"', (tmp_path / "a.html").read_text())]
    assert lengths == pytest.approx([1000 * 200 / 210, 1000 * 10 / 210], abs=0.1)
    capsys.readouterr()


def test_a_run_far_from_public_ones_says_so(tool, tmp_path, capsys):
    log = made.write_log(tmp_path / "a.txt", curve=(0.198, 0.25, 0.3, 0.31), status="aborted")
    assert tool.main([str(log), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[0]["public_runs"]
    assert [row["far"] for row in found] == [True, True, True, True] and "far below" in found[0]["words"]
    other = made.write_log(tmp_path / "b.txt", samples=(292, 72), curve=(0.1,) * 4)  # nobody's data set
    assert tool.main([str(other), "--json"]) == 0 and json.loads(capsys.readouterr().out)[0]["public_runs"] == []


@pytest.mark.parametrize("options", [
    {"killed_after": 0}, {"killed_after": 2}, {"curve": ("x",) * 4}, {"epochs": 1}, {"division": "open"},
    {"benchmark": "maskrcnn", "curve": [{"BBOX": 0.1, "SEGM": 0.2}] * 4}, {"benchmark": "bert"},
])  # fmt: skip
def test_every_log_has_a_page(tool, tmp_path, options, capsys):
    log = made.write_log(tmp_path / "a.txt", **options)
    assert tool.main([str(log), "--out", str(tmp_path / "page.html")]) == 0
    parse((tmp_path / "page.html").read_text())
    capsys.readouterr()


def test_pages_of_a_folder_of_logs(tool, tmp_path, capsys):
    made.write_result(tmp_path)
    assert tool.main([str(tmp_path)]) == 0 and len(list(tmp_path.glob("*.html"))) == 5
    with pytest.raises(UserError, match="these are 5 runs"):
        tool.main([str(tmp_path), "--out", str(tmp_path / "x.html")])
    capsys.readouterr()


@pytest.mark.slow
def test_pages_in_a_real_browser(tool, tmp_path, capsys):
    """Chromium lays them out: the curves are drawn at some size, and nothing leaves the page sideways."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium here (Debian: chromium-headless-shell or chromium)")
    made.write_tree(tmp_path / "us")
    log = tmp_path / "us/results/box/retinanet/result_0.txt"
    assert tool.main([str(log), "--out", str(tmp_path / "report.html")]) == 0
    assert compare.main([str(tmp_path / "us"), str(log), "--out", str(tmp_path / "compare.html")]) == 0
    capsys.readouterr()
    probe = """<script>const boxes = [...document.querySelectorAll("svg path, svg rect, table, h1")].map(e => {
      const b = e.getBoundingClientRect(); return [e.getAttribute("class"), b.width, b.height, b.right] });
      document.title = JSON.stringify({boxes, wide: document.documentElement.scrollWidth, view: innerWidth})</script>"""
    for name in ("report.html", "compare.html"):
        page = tmp_path / f"probe_{name}"
        page.write_text((tmp_path / name).read_text().replace("</body>", probe + "</body>"))
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,2000", "--dump-dom"]
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=300)
        found = json.loads(re.search(r"<title>(.*?)</title>", done.stdout, re.S)[1].replace("&quot;", '"'))
        assert found["wide"] <= found["view"] and len(found["boxes"]) > 10
        curves = [box for box in found["boxes"] if box[0] and box[0].startswith("line")]
        assert curves and all(width > 100 and height > 5 for _, width, height, _ in curves)


def test_the_best_is_of_the_metric_that_has_the_target(tool, tmp_path, capsys):
    found = lines()
    found[0]["targets"] = {"L2_ALL_NS": 0.4}
    for value, line in zip((0.625, 0.25), (line for line in found if line["kind"] == "eval"), strict=True):
        line["metrics"]["L2_ALL_NS"] = value
    make(tmp_path, found)
    assert tool.main([str(tmp_path)]) == 0
    assert "best L2_ALL_NS 0.6250 after epoch 1" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "Best L2_ALL_NS" in page and "Best mAP" not in page
