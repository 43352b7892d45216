"""The report: complete, self-contained, and true to the plan."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from freqopt.calibration.measure.ladder import THRESHOLDS
from freqopt.calibration.measure.spectrum import band_cutoff
from freqopt.config import ALL
from freqopt.errors import PlanError
from freqopt.plan.plan import Plan
from freqopt.plan.records import (
    BucketCurves,
    Budget,
    Comparison,
    ContentCurve,
    Curve,
    Evidence,
    ModelIdentity,
    SiteEvidence,
    SitePlan,
    SiteTiming,
    Spectrum,
    Trial,
    Verified,
    Versions,
)
from freqopt.reporting.errors import frontier, judged_error, sample_errors
from freqopt.reporting.figures import error_cost_curves, probe_scatter
from freqopt.reporting.maps import heat_maps, timestep_maps
from freqopt.reporting.orders import bought, order_maps
from freqopt.reporting.report import Section, _cards, figure_html, report, table_html
from freqopt.reporting.speed import model_parts, site_times
from freqopt.reporting.style import thin

HEADS = 3


def curve(spread: float) -> Curve:
    x = np.array(THRESHOLDS)[:, None] * spread * np.array([1.0, 2.0, 4.0])
    density = 1.0 / (1.0 + x)
    error = 0.3 * (1 - density) ** 2 + 2e-4
    rows = [a.tolist() for a in (density, error, -0.1 * error, 1.1 * error)]
    return Curve(density=rows[0], error=rows[1], bias=rows[2], probe_error=rows[3])


def make_plan(*, buckets: bool = True, evidence: bool = True) -> Plan:
    power = np.exp(-np.arange(32) / 6.0)
    sites, found = {}, {}
    budgets = [
        Budget(threshold=[factor * x for x in (1.0, 0.5, 0.1)])
        for factor in ((1.0, 0.5) if buckets else (1.0,))
    ]
    for name, decision in (("blocks.0.attn", "split"), ("blocks.1.<attn>", "dense")):
        split = decision == "split"
        sites[name] = SitePlan(
            heads=HEADS,
            head_dim=64,
            tokens=32760,
            gains=[[0.5] * HEADS] * (2 if buckets else 1),
            marginals=[[2.0, -0.5, 1.0]] * (2 if buckets else 1) if split else [],
            decision="split" if split else "dense",
            reason="" if split else "saves nothing & so on",
            budgets=budgets if split else [],
            density=[0.0625, 0.125, 0.25] if split else [],
            error=[0.1, 0.05, 0.02] if split else [],
        )
        found[name] = SiteEvidence(
            thresholds=list(THRESHOLDS),
            energy=[0.5, 0.3, 0.2],
            curve=curve(1.0),
            buckets=[
                BucketCurves(
                    bucket=b,
                    samples=1,
                    energy=[0.5, 0.3, 0.2],
                    curve=curve(s),
                )
                for b, s in enumerate((1.0, 3.0))
            ]
            if buckets
            else [],
            spectrum=Spectrum(
                edges=(np.arange(1, 33) / 32).tolist(),
                power=[(power / power.sum()).tolist()] * HEADS,
                cutoff=band_cutoff((21, 30, 52)),
                low=[0.5] * HEADS,
            ),
            times_ms=(22.9, 4.4) if split else None,
        )
    trial = Trial(
        multiplier=1.0,
        predicted_error=0.02,
        measured_error=0.0276,
        worst_error=0.031,
        mean_density=0.1234,
        sample_errors=[0.024, 0.031],
    )
    return Plan(
        model=ModelIdentity(class_name="Video<DiT>", fingerprint="0123456789abcdef"),
        grids=[(21, 30, 52)],
        device="cpu",
        versions=Versions(freqopt="0.1.0", torch="2.13.0"),
        target_error=0.03,
        measured_error=0.0276,
        worst_error=0.031,
        mean_density=0.1234,
        sites=sites,
        timestep_name="timestep",
        timestep_edges=[500.0] if buckets else [],
        evidence=Evidence(
            samples=6,
            held_out=2,
            notes=["only <one> note"],
            bucket_samples=[3, 3] if buckets else [6],
            timings=[
                SiteTiming(
                    heads=HEADS,
                    tokens=32760,
                    head_dim=64,
                    dense_ms=22.9,
                    base_ms=0.5,
                    density_ms=24.0,
                    points=[(0.03, 1.3), (0.1, 2.8), (0.3, 7.8)],
                )
            ],
            trials=[trial],
            dense_sites={"blocks.0.attn2": "cross-attention"},
            sites=found if evidence else {},
        ),
    )


class Page(HTMLParser):
    """Text, image sources and tag balance of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.images, self.open = "", [], []  # type: ignore[var-annotated]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    extra = Section("Contact sheets", "<p>the <b>videos</b></p>")
    assert report(make_plan(), path, extra_sections=[extra]) == path
    return path.read_text()


def test_modelled_times_are_those_of_the_line() -> None:
    """Three heads share 0.5 ms and 24 ms per unit of density."""
    plan = make_plan(buckets=False)
    (found,) = site_times(plan).values()
    density = plan.sites["blocks.0.attn"].density
    assert found == (22.9, 4.4, pytest.approx(0.5 + 8.0 * sum(density)))


def test_split_sites_slower_than_dense_are_named(undrawn: None, tmp_path: Path) -> None:
    plan = make_plan()
    assert "no faster" not in str(plan)
    evidence = plan.evidence.sites["blocks.0.attn"]
    plan.evidence.sites["blocks.0.attn"] = evidence.model_copy(update={"times_ms": (4.0, 6.5)})
    words = "1 split sites (blocks.0.attn) are no faster than dense attention as timed: 6.5 ms"
    assert words in str(plan)
    assert words in report(plan, tmp_path / "slow.html").read_text()


def test_page_is_complete(html: str) -> None:
    page = Page(html)
    assert page.open == []
    for words in (
        "Video<DiT>",
        "2.76 %",
        "3 %",
        "12.3 %",
        "1 of 2",
        "21x30x52",
        "only <one> note",
        "Error-cost curves",
        "Spectra of the keys",
        "Probe error against true error",
        "Density and error per layer and head",
        "What reaches the output",
        "cross-attention",
        "blocks.1.<attn>",
        "saves nothing & so on",
        "0123456789abcdef",
        "32,760",
        "0.0276",
        "the videos",
        "50 %",
        "22.9 ms dense, 4.4 ms with this plan (5.2 times faster)",
        "costs says 4.0 ms",
    ):
        assert words in page.text, words


def test_page_needs_no_network(html: str) -> None:
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", html)
    assert "@import" not in html and "url(" not in html and "<script" not in html
    page = Page(html)
    assert len(page.images) == 9
    for image in page.images:
        assert image["alt"]
        ElementTree.fromstring(base64.b64decode(image["src"].split("base64,", 1)[1]))


def test_extra_sections_come_first_and_are_linked(html: str) -> None:
    assert html.index("Contact sheets</h2>") < html.index("Error against cost</h2>")
    assert '<a href="#s1">Contact sheets</a>' in html and 'id="s1"' in html


def test_cards_say_what_was_verified() -> None:
    errors = {"sample_errors": [0.01, 0.02, 0.04], "spread": 0.0125, "dtype": "bfloat16"}
    verified = Verified(**errors, quantile_error=0.04, model_ms=(300.0, 150.0))
    told = {"verified": verified, "target_quantile": 0.9, "target_error": 0.03}
    cards = {card.label: card for card in _cards(make_plan().model_copy(update=told))}
    within = cards["90% of held-out samples are within, target 3 %"]
    assert (within.value, within.good) == ("4.00 %", False)
    assert any("standard deviation 1.25 %" in label for label in cards)
    faster = cards["whole model, 300 ms dense, 150 ms split: times faster"]
    assert (faster.value, faster.good) == ("2.00", True)
    assert not any("worst" in card.label for card in _cards(make_plan()))


def test_same_plan_same_page(tmp_path: Path) -> None:
    plan = make_plan(buckets=False)
    plan.save(tmp_path / "plan.json")
    report(plan, tmp_path / "a.html")
    report(tmp_path / "plan.json", str(tmp_path / "b.html"))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


@pytest.mark.smoke
def test_plan_without_evidence(tmp_path: Path) -> None:
    report(make_plan(evidence=False), tmp_path / "r.html")
    text = Page((tmp_path / "r.html").read_text()).text
    assert "blocks.0.attn" in text and "Spectra" not in text


def test_bad_plan_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError):
        report(tmp_path / "absent.json", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def image_of(figure: Figure, panel: int) -> Any:
    return figure.axes[panel].images[0].get_array()


def test_heat_maps_show_the_plans_numbers() -> None:
    figure = heat_maps(make_plan())
    np.testing.assert_allclose(image_of(figure, 0), [[6.25, 12.5, 25.0], [100, 100, 100]])
    np.testing.assert_allclose(image_of(figure, 1), [[0.1, 0.05, 0.02], [0, 0, 0]])


def test_timestep_maps_read_each_buckets_curve_at_the_plans_threshold() -> None:
    figure = timestep_maps(make_plan())
    assert figure is not None and timestep_maps(make_plan(buckets=False)) is None
    first, second = image_of(figure, 0), image_of(figure, 1)
    at = [1.0, 0.5 * 2.0, 0.1 * 4.0]  # threshold x the head's factor
    np.testing.assert_allclose(first[0], [100 / (1 + x) for x in at], rtol=0.03)
    # the second bucket has half the thresholds and curves three times as steep
    np.testing.assert_allclose(second[0], [100 / (1 + 1.5 * x) for x in at], rtol=0.06)
    assert (first[1] == 100).all()


def test_frontier_of_calibrated_budgets_is_never_above_the_uniform_one() -> None:
    left = frontier(with_orders(make_plan())).axes[0]
    lines = {line.get_label(): line.get_xydata() for line in left.lines}
    ours, uniform = lines["by head and timestep"], lines["one threshold for all heads"]
    assert (np.diff(ours[:, 0]) >= 0).all() and (np.diff(ours[:, 1]) <= 1e-12).all()
    assert (np.diff(uniform[:, 1]) <= 1e-12).all(), "a line for each order, joined"
    # Past the last but one sites go dense, which jumps.
    compared = [(d, error) for d, error in uniform if ours[0, 0] < d < ours[-2, 0]]
    assert len(compared) >= 5
    for density, error in compared:
        assert np.interp(density, ours[:, 0], ours[:, 1]) <= error * 1.02


def with_orders(plan: Plan) -> Plan:
    """Orders by content measured at the split site: half of the error in chunks, the last head's.

    That head has it.
    """
    evidence = dict(plan.evidence.sites)
    name, known = "blocks.0.attn", evidence["blocks.0.attn"]
    content = [
        ContentCurve(
            chunk=chunk,
            density=known.curve.density,
            error=(factor * np.array(known.curve.error)).tolist(),
        )
        for chunk, factor in ((1024, 0.5), (ALL, 2.0))
    ]
    buckets = [each.model_copy(update={"content": content}) for each in known.buckets]
    evidence[name] = known.model_copy(update={"content": content, "buckets": buckets})
    sites = {**plan.sites, name: plan.sites[name].model_copy(update={"chunks": [0, 0, 1024]})}
    found = plan.evidence.model_copy(update={"sites": evidence})
    return plan.model_copy(update={"sites": sites, "evidence": found})


COMPARED = [
    Comparison(
        name=name,
        taken=name != "one threshold for all",
        predicted_error=0.02,
        measured_error=error,
        mean_density=density,
        cost=cost,
    )
    for name, error, density, cost in (
        ("marginals, round 1", 0.0281, 0.125, 0.31),
        ("one threshold for all", 0.0279, 0.2, 0.43),
    )
]


def compared_plan() -> Plan:
    plan = make_plan()
    return plan.model_copy(
        update={"evidence": plan.evidence.model_copy(update={"compared": COMPARED})}
    )


def marks(figure: Figure) -> dict[str, list[list[float]]]:
    """Points of the panel of what was measured, by their label in the legend."""
    right = figure.axes[1]
    legend = right.get_legend()
    assert legend is not None
    named = {text.get_text() for text in legend.get_texts()}
    found = {str(c.get_label()): np.asarray(c.get_offsets()).tolist() for c in right.collections}
    assert set(found) <= named
    return found


def test_what_was_predicted_and_what_was_measured_are_told_apart() -> None:
    """The plan's mark stands beside others of its own kind only, each measured on the same samples.

    Its trial is among those on held-out samples; one threshold was run on the fitted ones, as its
    own way was.
    """
    figure = frontier(compared_plan())
    assert not figure.axes[0].collections, "marks among predictions"
    found = marks(figure)
    assert found["this plan, held-out samples"] == [[0.1234, 0.0276]]
    assert found["trials, held-out samples"] == [[0.1234, 0.0276]]
    assert found["one threshold, fitted samples"] == [[0.2, 0.0279]]
    assert found["by head, fitted samples"] == found["the way that was taken"] == [[0.125, 0.0281]]
    assert len(figure.axes[1].lines) == 1, "the target alone: a line would be a prediction"


def test_a_plan_that_was_not_verified_is_marked_as_predicted() -> None:
    found = marks(frontier(compared_plan().model_copy(update={"predicted": True})))
    assert "this plan, predicted" in found and "trials, held-out samples" not in found


def test_a_plan_for_a_quantile_is_judged_by_it() -> None:
    verified = Verified(
        sample_errors=[0.01, 0.02, 0.04], spread=0.0125, dtype="bfloat16", quantile_error=0.04
    )
    plan = compared_plan().model_copy(update={"verified": verified, "target_quantile": 0.9})
    assert judged_error(plan) == 0.04 and judged_error(compared_plan()) == 0.0276
    figure = frontier(plan)
    assert marks(figure)["this plan, held-out samples"] == [[0.1234, 0.04]]
    assert figure.axes[1].get_title(loc="left").endswith("90% of samples within")


def test_pages_compare_what_was_measured_alike(undrawn: None, tmp_path: Path) -> None:
    report(compared_plan(), tmp_path / "r.html")
    text = Page((tmp_path / "r.html").read_text()).text
    assert "marginals, round 1 (taken)" in text and "43.0 %" in text
    assert "predicted to be 0.0200 and measured as 0.0276, 1.38 times that" in text


def test_samples_errors_stand_at_their_timesteps() -> None:
    errors = {"sample_errors": [0.02, 0.05, 0.01], "spread": 0.017, "dtype": "float32"}
    plan = make_plan().model_copy(
        update={"verified": Verified(**errors, sample_timesteps=[900.0, 20.0, 500.0])}
    )
    figure = sample_errors(plan)
    assert figure is not None
    (points,) = (c for c in figure.axes[0].collections if len(c.get_offsets()) == 3)
    np.testing.assert_allclose(points.get_offsets(), [[20, 0.05], [500, 0.01], [900, 0.02]])
    colours = np.asarray(points.get_facecolor())
    assert (colours[0] != colours[1]).any() and (colours[1] == colours[2]).all()
    assert figure.axes[0].get_xlabel() == "timestep"
    figure = sample_errors(make_plan().model_copy(update={"verified": Verified(**errors)}))
    assert figure is not None and figure.axes[0].get_xlabel() == "sample"
    assert sample_errors(make_plan()) is None


def test_what_orders_buy_is_read_at_the_same_density() -> None:
    plan = with_orders(make_plan())
    (heads,) = bought(plan).values()
    assert [each.chunk for each in heads] == [0, 0, 1024]
    for each, density in zip(heads, plan.sites["blocks.0.attn"].density, strict=True):
        assert each.grid == pytest.approx(0.3 * (1 - density) ** 2 + 2e-4, rel=0.05)
        assert each.content[ALL] == pytest.approx(2 * each.grid)
        assert each.ratio == pytest.approx(0.5)
    assert bought(make_plan()) == {}


def test_order_maps_show_the_orders() -> None:
    figure = order_maps(with_orders(make_plan()))
    orders, ratios = image_of(figure, 0), image_of(figure, 1)
    np.testing.assert_array_equal(orders[0], [0, 0, 1])
    assert np.isnan(np.ma.filled(orders[1], np.nan)).all(), "a dense site has no order"
    np.testing.assert_allclose(ratios[0], [-1, -1, -1], atol=1e-9)  # in powers of two
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "grid",
        "content, chunks of 1,024",
        "dense",
    ]


def test_pages_say_what_orders_buy(undrawn: None, tmp_path: Path) -> None:
    report(with_orders(make_plan()), tmp_path / "r.html")
    text = Page((tmp_path / "r.html").read_text()).text
    assert "1 of 3 heads are ordered by content: their error is 0.50 times" in text
    assert "2 of 3 heads keep the grid" in text and "content 1 of 3" in text
    report(make_plan(), tmp_path / "grid.html")
    assert "Order per head" not in (tmp_path / "grid.html").read_text()


def test_curves_are_those_of_a_heads_own_order() -> None:
    lines = error_cost_curves(with_orders(make_plan())).axes[0].lines
    by_grid = error_cost_curves(make_plan()).axes[0].lines
    factors = [np.divide(a.get_ydata(), b.get_ydata()) for a, b in zip(lines, by_grid, strict=True)]
    np.testing.assert_allclose([np.median(each) for each in factors], [1, 1, 0.5], rtol=1e-6)


def test_timestep_maps_read_a_heads_own_order() -> None:
    """The last head's error by content is half of that by the grid at every threshold."""
    figures = [timestep_maps(plan) for plan in (make_plan(), with_orders(make_plan()))]
    by_grid, by_content = (image_of(f, 2) for f in figures if f is not None)
    np.testing.assert_allclose(by_content[0], by_grid[0] * [1, 1, 0.5], rtol=1e-6)


def test_the_whole_models_time_is_shown(undrawn: None, tmp_path: Path) -> None:
    verified = Verified(sample_errors=[0.02], spread=0.0, dtype="float16", model_ms=(60.0, 40.0))
    plan = make_plan().model_copy(update={"verified": verified})
    parts = model_parts(plan)
    assert parts is not None
    assert parts["dense"] == pytest.approx((22.9, 37.1))
    assert parts["split"] == pytest.approx((4.4, 35.6))
    report(plan, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "dense, 60 ms" in page and "split, 40 ms" in page and "width: 38.17%" in page
    assert "launches included, as timed" in page.replace("\n", " ")
    for clock, words in (
        ("eager", "compiled nowhere but at attention"),
        ("graphs", "compiled, in CUDA graphs"),
    ):
        ran = verified.model_copy(update={"model_clock": clock})
        report(plan.model_copy(update={"verified": ran}), tmp_path / "r.html")
        page = (tmp_path / "r.html").read_text().replace("\n", " ")
        assert f"launches included, {words}, as timed" in page
    assert model_parts(make_plan()) is None


def test_probe_scatter_measures_agreement() -> None:
    found = probe_scatter(make_plan())
    assert found is not None
    _, correlation, ratio = found
    assert correlation > 0.99 and ratio == pytest.approx(1.1, abs=1e-3)


def test_tables_escape_and_align() -> None:
    html = table_html(("a", "b"), [("<x>", 1)], numbers=[1])
    assert "<td>&lt;x&gt;</td>" in html and '<td class="number">1</td>' in html
    assert '<th class="number">b</th>' in html


def test_figures_and_captions() -> None:
    html = figure_html(Figure(figsize=(1, 1)), "a < b")
    assert "<figcaption>a &lt; b</figcaption>" in html and 'alt="a &lt; b"' in html


def test_thin_keeps_the_ends() -> None:
    names = [str(i) for i in range(100)]
    assert thin(names[:5]) == names[:5]
    kept = thin(names, 10)
    assert len(kept) == 10 and kept[0] == "0" and kept[-1] == "99"
