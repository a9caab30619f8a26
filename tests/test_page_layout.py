"""report.html in a browser, where there is one: nothing off the screen, no text on other text, enough contrast."""

import html
import json
import re
import shutil
import subprocess

import pytest
from test_page import folder  # noqa: F401 - a fixture

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WIDTHS = (390, 768, 1440)
PAPER = 718  # pixels between the margins of A4
MEASURE = """
function looked(frame) {
  const d = frame.contentDocument, w = frame.clientWidth, off = [], over = [], boxes = [];
  const scrolls = e => !d.documentElement.dataset.paper && e.closest('.wide, .scroll, .chart');
  const hidden = e => e.closest('details:not([open]) > *:not(summary)');
  for (const e of d.querySelectorAll('body *')) {
    const r = e.getBoundingClientRect();
    if (r.width && !hidden(e) && !scrolls(e) && r.right > w + 1) off.push(`${e.tagName} ${e.className} ${r.right}`);
  }
  const walk = d.createTreeWalker(d.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const n = walk.currentNode, e = n.parentElement;
    if (!n.data.trim() || hidden(e) || e.closest('style, title')) continue;
    const range = d.createRange(); range.selectNodeContents(n);
    for (const r of range.getClientRects()) boxes.push([r, n.data.trim().slice(0, 30)]);
  }
  boxes.sort((a, b) => a[0].top - b[0].top);
  for (let i = 0; i < boxes.length; i++)
  for (let j = i + 1; j < boxes.length && boxes[j][0].top < boxes[i][0].bottom; j++) {
    const a = boxes[i][0], b = boxes[j][0];
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left), y = Math.min(a.bottom, b.bottom) - b.top;
    if (x > 2 && y > 4) over.push(boxes[i][1] + ' | ' + boxes[j][1]);
  }
  return {width: w, page: d.documentElement.scrollWidth, off, over, texts: boxes.length};
}
onload = () => setTimeout(() => {
  document.getElementById('out').textContent = JSON.stringify([...document.querySelectorAll('iframe')].map(looked));
}, 300);
"""


@pytest.mark.integration
@pytest.mark.skipif(BROWSER is None, reason="there is no browser")
def test_nothing_is_off_the_screen_and_no_text_on_other_text(folder, tmp_path):  # noqa: F811
    page = re.sub(r"<meta http-equiv=.*?>", "", (folder[0] / "report.html").read_text())
    paper = page.replace("@media print", "@media all").replace("<details>", "<details open>")
    paper = paper.replace("<html ", '<html data-paper="A4" ')  # on which nothing scrolls
    frames = "".join(
        f'<iframe style="width:{width}px;height:9000px;border:0" srcdoc="{html.escape(shown)}"></iframe>'
        for width, shown in [*((width, page) for width in WIDTHS), (PAPER, paper)]
    )
    (tmp_path / "frames.html").write_text(f'<body><pre id="out"></pre>{frames}<script>{MEASURE}</script>')
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=9000", "--dump-dom"]
    done = subprocess.run([*command, f"file://{tmp_path / 'frames.html'}"], capture_output=True, text=True, timeout=120)
    found = json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    assert [frame["width"] for frame in found] == [*WIDTHS, PAPER]
    for frame in found:
        assert frame["texts"] > 50
        assert frame["page"] <= frame["width"] and frame["off"] == [] and frame["over"] == [], frame["width"]


def _light(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(one, other):
    light, dark = sorted((_light(one), _light(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_have_the_contrast_that_accessibility_asks_for():
    from sqa_convert.report.templates import _environment

    source = _environment().loader.get_source(_environment(), "style.css")[0]
    themes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", source, re.DOTALL)
    ]
    light, dark = themes[:2]
    for theme in (light, light | dark):
        for ground in ("paper", "card"):
            assert all(
                _contrast(theme[text], theme[ground]) >= 4.5 for text in ("ink", "soft", "accent", "patterns", "values")
            )
            assert all(
                _contrast(theme[bar], theme[ground]) >= 3
                for bar in (
                    "source",
                    "converted",
                    "uptrained",
                    "control",
                    "mean",
                    "slower",
                    "patterns",
                    "values",
                    "mark",
                    "good",
                    "fair",
                    "bad",
                )
            )
