"""Parts of the HTML pages that reports and audits are: plain tags, one style, nothing fetched from anywhere."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from sermll.pictures import ACCENT


class Html(str):
    """Markup; any other text is escaped when it becomes part of the page."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: str) -> Html:
    """An element; `class_` becomes class, and http_equiv http-equiv."""
    inside = "".join(child if isinstance(child, Html) else escape(str(child)) for child in children)
    words = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{words}>") if name in ("img", "meta") else Html(f"<{name}{words}>{inside}</{name}>\n")


def table(header: Sequence[object], rows: Iterable[Sequence[object]], words: Sequence[int] = (0,)) -> Html:
    """A table that scrolls sideways on a narrow screen; columns in `words` are text, the others numbers."""
    looks = ["word" if place in words else "number" for place in range(len(header))]
    head = tag("tr", *(tag("th", cell, class_=look, scope="col") for cell, look in zip(header, looks, strict=True)))
    body = [tag("tr", *(tag("td", cell, class_=look) for cell, look in zip(row, looks, strict=True))) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="wide")


def page(title: str, sections: Iterable[Html]) -> str:
    """A whole page."""
    # The policy lets a browser fetch nothing at all: the page is what the file holds.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = tag(
        "head",
        Html('<meta charset="utf-8">\n'),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        Html(f"<style>{_STYLE}</style>\n"),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", tag("main", *sections)), lang="en")


def facts(facts: Mapping[str, object]) -> Html:
    """A list of terms, each with what there is to say of it."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items()))


def figure(svg: bytes, title: str, caption: str) -> Html:
    """A picture within the page, with what it shows in words below it."""
    source = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    image = tag("div", tag("img", src=source, alt=f"{title}. {caption}"), class_="wide")
    return tag("figure", image, tag("figcaption", caption))


def count(things: Sequence[object], name: str) -> str:
    """A number of things in words, such as `6 folds`."""
    return f"{len(things)} {name}" + ("" if len(things) == 1 else "s")


_STYLE = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: white; color: #1d1d1f; font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }}
main {{ max-width: 54rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }}
h1, h2 {{ margin: 0 0 .4rem; font-size: 2rem; line-height: 1.2; overflow-wrap: anywhere; }}
h3 {{ margin: 2.6rem 0 .6rem; font-size: 1.15rem; break-after: avoid; }}
p {{ margin: .5rem 0; overflow-wrap: anywhere; }}
section + section {{ margin-top: 3.5rem; padding-top: 2.5rem; border-top: 3px solid {ACCENT}; }}
a {{ color: {ACCENT}; }}
small {{ color: #5a5a60; font-size: .85rem; font-weight: 400; white-space: nowrap; }}
td small {{ display: block; white-space: normal; }}
.result {{ margin-top: 1.2rem; padding: .8rem 1.1rem; border-left: 5px solid {ACCENT};
  background: #f2f6fa; }}
.score {{ display: block; color: {ACCENT}; font-size: 2rem; font-weight: 700; line-height: 1.25; }}
.notice {{ padding: .5rem 1rem; border-left: 5px solid #b00020; background: #fdf2f3; }}
.wide {{ overflow-x: auto; }}
table {{ width: 100%; border-collapse: collapse; font-size: .95rem; }}
th, td {{ padding: .4rem .9rem .4rem 0; border-bottom: 1px solid #dfe1e5; vertical-align: baseline; }}
th:last-child, td:last-child {{ padding-right: 0; }}
th {{ border-bottom: 2px solid #1d1d1f; font-weight: 600; vertical-align: bottom; }}
.number + .word {{ padding-left: .6rem; }}
.number {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }}
th.number {{ white-space: normal; }}
.word {{ text-align: left; }}
td.word {{ min-width: 8rem; overflow-wrap: break-word; }}
td.word:first-child {{ min-width: 5.5rem; font-weight: 600; }}
figure {{ margin: 0; break-inside: avoid; }}
figure img {{ display: block; max-width: 100%; min-width: 34rem; height: auto; }}
figcaption {{ margin-top: .4rem; color: #5a5a60; font-size: .9rem; }}
dl {{ margin: 0; }}
dl div {{ display: grid; grid-template-columns: 8.5rem 1fr; gap: 0 1rem; padding: .35rem 0;
  border-bottom: 1px solid #dfe1e5; }}
dt {{ font-weight: 600; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
details {{ margin-top: .8rem; }}
summary {{ cursor: pointer; color: {ACCENT}; }}
pre {{ padding: .8rem 1rem; background: #f5f6f8; overflow-x: auto; font-size: .82rem; line-height: 1.4; }}
@media (max-width: 34rem) {{ dl div {{ grid-template-columns: 1fr; }} h1, h2 {{ font-size: 1.6rem; }} }}
@media print {{
  main {{ max-width: none; padding: 0; }}
  body {{ font-size: 10.5pt; }}
  .wide {{ overflow: visible; }}
  figure img {{ min-width: 0; }}
  tr {{ break-inside: avoid; }}
  section + section {{ break-before: page; border: 0; }}
}}
"""
