"""A run's page, from handwritten files: what it shows, what it escapes, and in a real browser."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image
from support.browser import chromium, needs_chromium

from cps_hf.commands import report as command
from cps_hf.report.page import render_report, write_report

HOSTILE = '<script>document.title="taken"</script>'
IMAGE = '"><img src=x onerror=document.title="taken">'
NAMES = ["ground", HOSTILE, "bar"]
MATRIX = [[80, 10, 10], [0, 0, 0], [30, 0, 70]]  # the second class does not occur but is predicted


def write_run(folder, *, count=3, plan=True, comparison=True, step=40):
    """The files of a run that the page reads. `step`: of the evaluation; `best` is of step 40."""
    (folder / "pictures" / "images").mkdir(parents=True)
    Image.new("RGB", (990, 700), (250, 250, 250)).save(folder / "pictures" / "curves.png")
    rng = np.random.default_rng(0)
    for kind in ("worst_0", "best_0"):
        for what in ("image", "truth", "prediction"):
            pixels = rng.integers(0, 255, (60, 90, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / "images" / f"{kind}_{what}.jpg")
    (folder / "best").mkdir()
    (folder / "best" / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "x"}}))
    scores = {"mean_iou": 0.612}
    results = {
        "final": {"branch_0": scores},
        "best": {"branch_0": scores, "branch": "branch_0", "step": 40},
        "agreement": {"start": 0.4, "end": 0.99},
        "steps": 80,
        "training": {"seconds": 4000.0, "device": "cpu"},
        "objective": {"name": "CrossPseudoSupervision"},
        "dataset": HOSTILE,
        "num_labeled": 12,
        "num_unlabeled": 388,
    }
    if comparison:
        classes = [{"name": HOSTILE, "difference": 0.02, "low": 0.01, "high": 0.03, "images": 9, "verdict": "better"}]
        results["comparison"] = {
            "sentence": f"The second stage changed {HOSTILE} by +2.0 points.",
            "branches": {"branch_0": {"classes": classes}},
        }
        of = {"mean_iou": 0.5, "seconds": 12.0, "steps": 40}
        compared = {"supervised": of, "semi_supervised": {**of, "mean_iou": 0.534, "method": "cps"}, "images": 20}
        compared["difference"] = {"mean_iou": 0.034, "low": 0.01, "high": 0.06}
        (folder / "comparison.json").write_text(json.dumps(compared))
    (folder / "results.json").write_text(json.dumps(results))
    records = [{"step": 0, "eval_agreement": 0.4, "eval_commonest_class": 0.5}]
    records.append({"step": 80, "eval_agreement": 0.99, "eval_commonest_class": 0.995})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (folder / "config.yaml").write_text(yaml.safe_dump({"objective": "cps", "learning_rate": 4e-3, HOSTILE: HOSTILE}))
    if plan:
        rows = [{"name": "crop_size", "value": [160, 160], "reason": f"images are 240 x 180 {HOSTILE}"}]
        (folder / "plan.json").write_text(json.dumps(rows))

    def shown(kind, score):
        files = [f"pictures/images/{kind}_0_{what}.jpg" for what in ("image", "truth", "prediction")]
        return [{"id": IMAGE, "mean_iou": score, "files": files}]

    names = NAMES[:count] + [f"class {i}" for i in range(3, count)]
    matrix = np.zeros((count, count), int)
    matrix[:3, :3] = MATRIX
    evaluation = {
        "network": "branch_0",
        "step": step,
        "images": 7,
        "classes": names,
        "confusion_matrix": matrix.tolist(),
    }
    evaluation |= {"palette": [[0, 0, 0], *([i, 114, 178] for i in range(1, count))]}
    evaluation |= {"worst": shown("worst", 0.25), "best": shown("best", None)}
    ranking = {"key": "disagreement", "images": 9, "first": [{"image": IMAGE, "score": 0.25}]}
    (folder / "ranking.json").write_text(json.dumps(ranking))
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


class Page(HTMLParser):
    """The tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.text += " " if tag in ("td", "th", "dd", "p") else ""

    def handle_data(self, data):
        self.text += data


def test_names_are_escaped_and_the_page_loads_nothing(tmp_path):
    text = render_report(write_run(tmp_path / "run"))
    page = Page(text)
    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"script", "iframe", "object", "embed", "link", "form", "base"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, attributes)
    assert "url(" not in text and "@import" not in text
    assert HOSTILE in page.text and IMAGE in page.text  # shown verbatim
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert f"{IMAGE}: truth" in alts and len(alts) == 7


def test_it_shows_plan_answer_classes_and_loading_code(tmp_path):
    text = Page(render_report(write_run(tmp_path / "run"))).text
    flat = " ".join(text.split())
    for said in (
        "crop_size 160, 160 images are 240 x 180",
        "Best network branch 0 at step 40 Its mean IoU 41.7 %",  # the mean of the class table
        "Branch 0 at step 40 (in best/) on the evaluation images",
        "ground (not tinted)",
        "12 labeled, 388 unlabeled",
        "1 h 07 min on cpu",
        "Cross Pseudo Supervision",
        "by +2.0 points.",
        "with unlabeled images 53.4 40 12",
        "Difference: +3.4 points (95 % interval +1.0 to +6.0)",
        "the branches agree on 99.0 % of unlabeled pixels; 99.5 % of their predictions are one class",
        "The folder best/ contains branch 0 at step 40.",
        "mean IoU 25.0 %",
        f"AutoModelForSemanticSegmentation.from_pretrained('{tmp_path / 'run' / 'best'}', trust_remote_code=True)",
    ):
        assert said in flat, said
    # Expected: 80 / 130, 160 / 210, 80 / 100; the class that does not occur is predicted: 0 / 10.
    assert "ground 61.5 76.2 80.0 50.0 55.0" in flat and f"{HOSTILE} 0.0 0.0 – 0.0 5.0" in flat


def test_a_page_on_another_network_than_the_best_names_both(tmp_path):
    flat = " ".join(Page(render_report(write_run(tmp_path / "run", step=80))).text.split())
    for said in (
        "Network on this page branch 0 at step 80, mean IoU 41.7 %",
        "Best network (best/) branch 0 at step 40, mean IoU 61.2 %",
        "The network in best/ is another one: branch 0 at step 40, mean IoU 61.2 %.",
        "The folder best/ contains branch 0 at step 40.",
    ):
        assert said in flat, said
    assert "(in best/)" not in flat


def test_missing_parts_are_omitted(tmp_path):
    run = write_run(tmp_path / "run", plan=False, comparison=False)
    for name in ("evaluation.json", "metrics.jsonl", "pictures/curves.png"):
        (run / name).unlink()
    text = render_report(run)
    for title in ("Did the unlabeled", "<h2>Curves", "<h2>Classes", "<h2>Images", "<h2>Confusion"):
        assert title not in text, title
    assert "learning_rate" in text and "0.004" in text  # from config.yaml, as there is no plan
    (run / "config.yaml").unlink()
    assert "Load the result" in render_report(run)
    (run / "results.json").write_text('{"training": {"seconds": 90.0}}')  # of an older version
    assert "2 min on ?" in render_report(run)


def test_many_classes_get_a_picture_instead_of_a_table(tmp_path):
    run = write_run(tmp_path / "run", count=41)
    text = render_report(run)
    assert "<h2>Confusion" in text and 'class="matrix"' not in text and 'alt="Confusion matrix"' in text


def test_the_command_writes_the_page_or_a_one_line_error(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert command.main([str(run)]) == run / "report.html"
    assert (run / "report.html").read_text(encoding="utf-8") == render_report(run)
    assert "report.html" in capsys.readouterr().out
    for spoil, said in (
        (lambda: (run / "evaluation.json").write_text("{"), "evaluation.json is incomplete or not JSON"),
        (lambda: (run / "results.json").write_text('{"branches": []}'), "the run is not finished. It logged step 80"),
        (lambda: (run / "results.json").unlink(), "--resume_from_checkpoint auto"),
    ):
        spoil()
        with pytest.raises(SystemExit):
            command.main([str(run)])
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and "Traceback" not in error
    (run / "metrics.jsonl").unlink()
    (run / "config.yaml").unlink()
    with pytest.raises(SystemExit):
        command.main([str(run)])
    assert "no results.json of a finished run" in capsys.readouterr().err


@pytest.mark.slow
@needs_chromium
def test_a_browser_shows_it_wide_and_narrow_without_an_error(tmp_path):
    path = write_report(write_run(tmp_path / "run"))
    with chromium(tmp_path / "profile") as browser:
        for width in (1280, 400):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(path.as_uri())
            assert browser.title == "run: training report"  # no name could change it
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width, width
            sizes = browser.execute_script(
                "return [...document.images].map(i => { i.loading = 'eager'; return i.naturalWidth })"
            )
            assert len(sizes) == 7
            broken = "return [...document.images].filter(i => i.complete && !i.naturalWidth).length"
            assert browser.execute_script(broken) == 0
            cells = browser.execute_script("return document.querySelectorAll('.matrix td').length")
            assert cells == 9
            for link in browser.execute_script("return [...document.querySelectorAll('nav a')].map(a => a.hash)"):
                assert browser.execute_script("return !!document.querySelector(arguments[0])", link), link
        errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []
    assert re.search(r"<title>run: training report</title>", path.read_text(encoding="utf-8"))
