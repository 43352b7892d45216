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
from freqopt.errors import PlanError
from freqopt.plan.plan import Plan
from freqopt.plan.records import (
    BucketCurves,
    Budget,
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
from freqopt.reporting.figures import frontier, probe_scatter, thin
from freqopt.reporting.maps import heat_maps, timestep_maps
from freqopt.reporting.report import Section, _cards, figure_html, report, table_html
from freqopt.reporting.speed import site_times

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


def test_split_sites_slower_than_dense_are_named(tmp_path: Path) -> None:
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
    lines = {line.get_label(): line.get_xydata() for line in frontier(make_plan()).axes[0].lines}
    ours, uniform = (
        lines["per head and timestep, errors alone"],
        lines["one threshold for all heads"],
    )
    assert (np.diff(ours[:, 0]) >= 0).all() and (np.diff(ours[:, 1]) <= 1e-12).all()
    # Past the last but one sites go dense, which jumps.
    compared = [(d, error) for d, error in uniform if ours[0, 0] < d < ours[-2, 0]]
    assert len(compared) >= 5
    for density, error in compared:
        assert np.interp(density, ours[:, 0], ours[:, 1]) <= error * 1.02


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
