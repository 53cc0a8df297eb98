"""The frame of every page that jft writes: one file, no scripts, no outside references."""

from html import escape

from jft.report.style import CSS


def page(title: str, body: str, extra_css: str = "") -> str:
    """Returns a whole HTML page.

    Args:
      title: of the window; escaped here.
      body: HTML between <main> and its footer.
      extra_css: rules after those of `jft.report.style`.
    """
    # The policy forbids scripts and every outside address, whatever a string may smuggle in.
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{CSS}{extra_css}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )
