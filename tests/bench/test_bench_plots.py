"""The plots that the bench draws."""

from __future__ import annotations

from xml.etree import ElementTree

from bench.plots import Line, Plot, svg

SVG = "{http://www.w3.org/2000/svg}"


def drawn() -> ElementTree.Element:
    lines = (
        Line("nginx <1>", ((36, 19.0), (72, 15.0), (144, 14.9)), 0),
        Line("pd-proxy", ((36, 34.0), (72, 31.0), (144, 15.0)), 1, dashed=True),
    )
    plots = [Plot("What a token costs", "µs", lines), Plot("How late", "ms", lines[:1])]
    return ElementTree.fromstring(svg(plots, "cost & delay"))


def test_every_point_is_on_its_line_and_within_the_picture() -> None:
    root = drawn()
    assert root.findtext(f"{SVG}title") == "cost & delay"
    circles = list(root.iter(f"{SVG}circle"))
    assert len(circles) == 9
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert all(0 < float(c.attrib["cx"]) < width and 0 < float(c.attrib["cy"]) < height for c in circles)
    ours = [float(c.attrib["cy"]) for c in circles[3:6]]
    assert ours == sorted(ours), "what costs less is drawn lower"


def test_names_of_lines_that_end_at_the_same_height_do_not_overlap() -> None:
    labels = {text.text: float(text.attrib["y"]) for text in drawn().iter(f"{SVG}text")}
    assert abs(labels["nginx <1>"] - labels["pd-proxy"]) >= 13


def test_the_axis_reaches_above_the_highest_point() -> None:
    texts = [text.text for text in drawn().iter(f"{SVG}text")]
    assert {"0", "10", "20", "30", "40"} <= set(texts)
    assert {"36", "72", "144", "streams"} <= set(texts)
