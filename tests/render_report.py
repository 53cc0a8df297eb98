"""Renders a page in headless Chromium as people see it: phone and desk, light and dark.

    python tests/render_report.py runs/x/report.html [FOLDER]

Writes four PNGs to the folder (the page's own by default) and exits 1 where the page is wider than
the window, where the browser reports an error, or where a text has too little contrast. Chromium is
spoken to through pipes (the DevTools protocol), so that no package is needed.
"""

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WIDTHS = (390, 1280)
SCHEMES = ("light", "dark")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars"
    " --disable-background-networking --disable-component-update --disable-sync"
    " --disable-dev-shm-usage --remote-debugging-pipe"
).split()

# Elements that stick out of the window, but not out of a box that scrolls. On a phone innerWidth
# grows with a page that is too wide: what counts is the width that was asked for.
OVERFLOW = """(width => {
  const wide = document.documentElement.scrollWidth > width;
  const out = [...document.querySelectorAll("body *")].filter(e => {
    if (e.closest(".scroll") && !e.matches(".scroll")) return false;
    const box = e.getBoundingClientRect();
    return box.width && (box.right > width + 1 || box.left < -1);
  });
  return {wide, out: out.slice(0, 5).map(e => e.tagName + "." + e.className)};
})"""

# Contrast of text with what is behind it, by WCAG 2.2; texts drawn on a translucent colour have
# that colour laid over the ground below.
CONTRAST = """(() => {
  const parse = c => { const v = c.match(/[\\d.]+/g).map(Number); return [...v, 1].slice(0, 4) };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const light = c => {
    const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const [r, g, b] = c.map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = e => {
    const layers = [];
    for (; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const poor = [];
  for (const e of document.querySelectorAll("body *")) {
    const said = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    const style = getComputedStyle(e);
    if (!said || style.visibility === "hidden" || !e.getClientRects().length) continue;
    const ink = parse(style.color), behind = ground(e);
    if (ink[3] === 0) continue;
    const [a, b] = [light(over(ink, behind)), light(behind)];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const large = parseFloat(style.fontSize) >= 24;
    const words = e.textContent.trim().slice(0, 20);
    if (ratio < (large ? 3 : 4.5))
      poor.push(`${e.tagName}.${e.className} ${words}: ${ratio.toFixed(2)}`);
  }
  return poor.slice(0, 8);
})()"""


def find_chromium():
    """The path of a Chromium or Chrome on this machine, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """A headless Chromium, spoken to through two pipes: JSON messages that end in a zero byte."""

    def __init__(self, program, profile):
        reads, self._out = os.pipe()  # its file 3
        self._in, writes = os.pipe()  # its file 4
        self._process = subprocess.Popen(
            ["bash", "-c", 'exec 3<&"$0" 4>&"$1"; shift; exec "$@"', str(reads), str(writes)]
            + [program, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self._ids, self._rest, self.events, self.session = itertools.count(1), b"", [], None

    def close(self):
        for end in (self._out, self._in):
            os.close(end)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def call(self, method, **params):
        """Sends one command and returns its result; events that come before are kept."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]
            self.events.append(found)

    def wait_for(self, method):
        """Waits for an event."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._next())

    def _next(self):
        while b"\0" not in self._rest:
            part = os.read(self._in, 1 << 20)
            if not part:
                raise RuntimeError("the browser has gone")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def value(self, expression):
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"]["value"]


def open_page(browser):
    """Attaches to a new page and listens to its console."""
    target = browser.call("Target.createTarget", url="about:blank")["targetId"]
    found = browser.call("Target.attachToTarget", targetId=target, flatten=True)
    browser.session = found["sessionId"]
    for domain in ("Page", "Runtime", "Log"):
        browser.call(f"{domain}.enable")


def screen(browser, path, width, scheme, target):
    """Shows a page at one width and scheme; writes its picture and returns what is wrong."""
    browser.events.clear()
    browser.call(
        "Emulation.setDeviceMetricsOverride",
        width=width, height=900, deviceScaleFactor=1, mobile=width < 600,
    )  # fmt: skip
    scheme_is = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.call("Emulation.setEmulatedMedia", features=scheme_is)
    browser.call("Page.navigate", url=path.resolve().as_uri())
    browser.wait_for("Page.loadEventFired")
    time.sleep(0.1)
    wrong = []
    fit = browser.value(f"{OVERFLOW}({width})")
    if fit["wide"] or fit["out"]:
        wrong.append(f"wider than the window: {', '.join(fit['out'])}")
    wrong += [f"contrast of {each}" for each in browser.value(CONTRAST)]
    for event in browser.events:
        entry = event.get("params", {}).get("entry", {})
        if event.get("method") == "Runtime.exceptionThrown" or entry.get("level") == "error":
            wrong.append(f"the browser reports: {event['params']}")
    picture = browser.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
    target.write_bytes(base64.b64decode(picture))
    return wrong


def render(path, folder, program=None):
    """Renders a page in every width and scheme; returns what is wrong, one line each."""
    program = program or find_chromium()
    folder.mkdir(parents=True, exist_ok=True)
    wrong = []
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(program, profile)
        try:
            open_page(browser)
            for width, scheme in itertools.product(WIDTHS, SCHEMES):
                name = f"{path.stem}_{width}_{scheme}.png"
                found = screen(browser, path, width, scheme, folder / name)
                wrong += [f"{name}: {line}" for line in found]
        finally:
            browser.close()
    return wrong


def main(argv):
    """Renders the page that is named first into the folder that is named second."""
    if not argv or not find_chromium():
        print(__doc__ if not argv else "chromium is not installed", file=sys.stderr)
        return 2
    path = Path(argv[0])
    wrong = render(path, Path(argv[1]) if len(argv) > 1 else path.parent)
    print("\n".join(wrong) or "four screens, nothing wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
