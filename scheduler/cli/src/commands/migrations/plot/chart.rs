//! Panels under one time axis, as SVG 1.1.

use std::fmt::Write as _;

const WIDTH: f64 = 960.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 72.0;
const BOTTOM: f64 = 52.0;
const PANEL: f64 = 170.0;
const GAP: f64 = 28.0;
/// The pause is often shorter than a pixel.
const LEAST_MARK: f64 = 2.5;
/// A band narrower than this has no room for its name.
const LABEL_ROOM: f64 = 58.0;

/// Room for the name of a line.
const LEGEND: f64 = 100.0;

/// One picture. Times are in seconds.
#[derive(Debug)]
pub struct Chart {
    pub title: String,
    pub end: f64,
    pub bands: Vec<Band>,
    pub mark: Option<Band>,
    pub panels: Vec<Panel>,
}

/// A stretch of time.
#[derive(Debug)]
pub struct Band {
    pub label: String,
    pub color: &'static str,
    pub from: f64,
    pub to: f64,
}

/// Lines that share a vertical axis.
#[derive(Debug)]
pub struct Panel {
    pub unit: &'static str,
    /// The axis reaches up to this at least.
    pub least_top: f64,
    pub lines: Vec<Line>,
}

/// One line.
#[derive(Debug)]
pub struct Line {
    pub name: &'static str,
    pub color: &'static str,
    pub points: Vec<(f64, f64)>,
}

impl Chart {
    /// The whole file.
    pub fn to_svg(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let bottom = self.panel_top(self.panels.len()) - GAP;
        let height = bottom + BOTTOM;
        writeln!(out, r#"<?xml version="1.0" encoding="UTF-8"?>"#)?;
        writeln!(
            out,
            r#"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">"#
        )?;
        writeln!(
            out,
            r##"<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>"##
        )?;
        text(
            out,
            LEFT,
            24.0,
            "start",
            "#000000",
            &self.title,
            r#" font-size="15""#,
        )?;
        for band in &self.bands {
            self.write_band(out, band, bottom)?;
        }
        for (number, panel) in self.panels.iter().enumerate() {
            self.write_panel(out, panel, self.panel_top(number))?;
        }
        if let Some(mark) = &self.mark {
            self.write_mark(out, mark, bottom)?;
        }
        self.write_time_axis(out, bottom)?;
        writeln!(out, "</svg>")
    }

    fn panel_top(&self, number: usize) -> f64 {
        (0..number).fold(TOP, |top, _| top + PANEL + GAP)
    }

    fn x(&self, seconds: f64) -> f64 {
        let part = if self.end > 0.0 { seconds / self.end } else { 0.0 };
        LEFT + part.clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT)
    }

    fn write_band(&self, out: &mut String, band: &Band, bottom: f64) -> std::fmt::Result {
        let (from, to) = (self.x(band.from), self.x(band.to));
        writeln!(
            out,
            r#"<rect x="{from:.1}" y="{TOP:.1}" width="{:.1}" height="{:.1}" fill="{}"><title>{}</title></rect>"#,
            to - from,
            bottom - TOP,
            band.color,
            escape(&band.label),
        )?;
        if to - from < LABEL_ROOM {
            return Ok(());
        }
        text(
            out,
            f64::midpoint(from, to),
            TOP - 8.0,
            "middle",
            "#455a64",
            &band.label,
            "",
        )
    }

    fn write_mark(&self, out: &mut String, mark: &Band, bottom: f64) -> std::fmt::Result {
        let from = self.x(mark.from);
        let width = (self.x(mark.to) - from).max(LEAST_MARK);
        writeln!(
            out,
            r#"<rect x="{from:.1}" y="{TOP:.1}" width="{width:.1}" height="{:.1}" fill="{}" fill-opacity="0.6"><title>{}</title></rect>"#,
            bottom - TOP,
            mark.color,
            escape(&mark.label),
        )?;
        let anchor = if from > WIDTH / 2.0 { "end" } else { "start" };
        text(out, from, TOP - 24.0, anchor, mark.color, &mark.label, "")
    }

    fn write_panel(&self, out: &mut String, panel: &Panel, top: f64) -> std::fmt::Result {
        let highest = panel
            .lines
            .iter()
            .flat_map(|line| &line.points)
            .map(|(_, value)| *value)
            .fold(panel.least_top, f64::max);
        let step = nice_step(highest / 4.0);
        let ceiling = (highest / step).ceil() * step;
        let y = |value: f64| top + PANEL - (value / ceiling).clamp(0.0, 1.0) * PANEL;
        let right = WIDTH - RIGHT;
        for tick in ticks(ceiling, step) {
            let at = y(tick);
            writeln!(
                out,
                r##"<line x1="{LEFT}" y1="{at:.1}" x2="{right}" y2="{at:.1}" stroke="#b0bec5" stroke-width="0.5"/>"##
            )?;
            text(out, LEFT - 6.0, at + 4.0, "end", "#37474f", &number(tick), "")?;
        }
        writeln!(
            out,
            r##"<line x1="{LEFT}" y1="{top:.1}" x2="{LEFT}" y2="{:.1}" stroke="#37474f"/>"##,
            top + PANEL
        )?;
        let (x, middle) = (18.0, top + PANEL / 2.0);
        let turned = format!(r#" transform="rotate(-90 {x} {middle:.1})""#);
        text(out, x, middle, "middle", "#37474f", panel.unit, &turned)?;
        for line in &panel.lines {
            let points: Vec<String> = line
                .points
                .iter()
                .map(|&(at, value)| format!("{:.1},{:.1}", self.x(at), y(value)))
                .collect();
            writeln!(
                out,
                r#"<polyline fill="none" stroke="{}" stroke-width="1.6" stroke-linejoin="round" points="{}"/>"#,
                line.color,
                points.join(" ")
            )?;
        }
        Self::write_legend(out, panel, top)
    }

    /// Over the lines, on a ground that lets them shine through.
    fn write_legend(out: &mut String, panel: &Panel, top: f64) -> std::fmt::Result {
        let width: f64 = panel.lines.iter().map(|_| LEGEND).sum();
        writeln!(
            out,
            r##"<rect x="{:.1}" y="{:.1}" width="{width:.1}" height="18" fill="#ffffff" fill-opacity="0.75"/>"##,
            LEFT + 4.0,
            top + 1.0
        )?;
        let mut legend = LEFT + 8.0;
        let at = top + 14.0;
        for line in &panel.lines {
            writeln!(
                out,
                r#"<rect x="{legend:.1}" y="{:.1}" width="14" height="4" fill="{}"/>"#,
                at - 6.0,
                line.color
            )?;
            text(out, legend + 20.0, at, "start", "#000000", line.name, "")?;
            legend += LEGEND;
        }
        Ok(())
    }

    fn write_time_axis(&self, out: &mut String, bottom: f64) -> std::fmt::Result {
        let right = WIDTH - RIGHT;
        writeln!(
            out,
            r##"<line x1="{LEFT}" y1="{bottom:.1}" x2="{right}" y2="{bottom:.1}" stroke="#37474f"/>"##
        )?;
        for tick in ticks(self.end, nice_step(self.end / 8.0)) {
            let x = self.x(tick);
            writeln!(
                out,
                r##"<line x1="{x:.1}" y1="{bottom:.1}" x2="{x:.1}" y2="{:.1}" stroke="#37474f"/>"##,
                bottom + 5.0
            )?;
            text(out, x, bottom + 19.0, "middle", "#37474f", &number(tick), "")?;
        }
        let middle = f64::midpoint(LEFT, right);
        text(
            out,
            middle,
            bottom + 38.0,
            "middle",
            "#37474f",
            "seconds since the start",
            "",
        )
    }
}

fn text(
    out: &mut String,
    x: f64,
    y: f64,
    anchor: &str,
    color: &str,
    words: &str,
    more: &str,
) -> std::fmt::Result {
    let words = escape(words);
    writeln!(
        out,
        r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" fill="{color}"{more}>{words}</text>"#
    )
}

/// 1, 2 or 5 times a power of ten, not less than asked for.
fn nice_step(least: f64) -> f64 {
    if !least.is_finite() || least <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(least.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|factor| factor * power >= least * 0.999);
    factor.unwrap_or(10.0) * power
}

fn ticks(end: f64, step: f64) -> impl Iterator<Item = f64> {
    (0..=20u32)
        .map(move |count| f64::from(count) * step)
        .take_while(move |tick| *tick <= end * 1.0001)
}

/// Without zeros that say nothing.
fn number(value: f64) -> String {
    if value >= 1e6 {
        return format!("{value:.1e}");
    }
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Text and attribute values; what XML 1.0 has no place for becomes '?'.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            other if other.is_control() => escaped.push('?'),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_numbers() {
        for (least, step) in [
            (0.24, 0.5),
            (1.0, 1.0),
            (1.2, 2.0),
            (370.0, 500.0),
            (6.0, 10.0),
            (0.0, 1.0),
        ] {
            assert!(
                (nice_step(least) - step).abs() < 1e-9,
                "{least}: {}",
                nice_step(least)
            );
        }
        let all: Vec<String> = ticks(1.0, 0.25).map(number).collect();
        assert_eq!(all, ["0", "0.25", "0.5", "0.75", "1"]);
        assert_eq!(number(1.5e12), "1.5e12");
    }

    #[test]
    fn words_are_escaped() {
        assert_eq!(escape("a<b>&\"c\"\u{1}"), "a&lt;b&gt;&amp;&quot;c&quot;?");
    }
}
