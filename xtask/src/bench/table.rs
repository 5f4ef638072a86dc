//! A table for people, of what was measured, what others need, and what was aimed at.

use std::fmt;

use serde_json::{Value, json};

/// What a number counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Unit {
    /// Time.
    Seconds,
    /// 10⁹ bytes.
    Gigabytes,
    /// Pages, or a ratio.
    Plain,
    /// A small part of something.
    Relative,
}

impl Unit {
    fn format(self, value: Option<f64>) -> String {
        let Some(value) = value else { return NOT_MEASURED.into() };
        match self {
            Self::Seconds if value < 0.1 => format!("{:.2} ms", value * 1e3),
            Self::Seconds => format!("{value:.2} s"),
            Self::Gigabytes => format!("{value:.2} GB"),
            Self::Plain if value >= 100.0 => format!("{value:.0}"),
            Self::Plain => format!("{value:.2}"),
            Self::Relative => format!("{value:.1e}"),
        }
    }
}

/// Of a figure that should be there.
const NOT_MEASURED: &str = "not measured";

/// What a row's limits are about.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limits {
    /// The ratio, at most `[must, aim]`.
    RatioAtMost([f64; 2]),
    /// The ratio, at least `[must, aim]`.
    RatioAtLeast([f64; 2]),
    /// Our own figure, at most `[must, aim]`.
    AtMost([f64; 2]),
}

/// One line: a figure of ours, perhaps beside a peer's.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// What is measured.
    pub what: String,
    /// Of both figures.
    pub unit: Unit,
    /// Our figure, if it could be taken.
    pub ours: Option<f64>,
    /// Whose, and theirs.
    pub peer: Option<(String, Option<f64>)>,
    /// Ours to theirs, as the median of rounds where there are several.
    pub ratio: Option<f64>,
    /// What was asked for.
    pub limits: Option<Limits>,
}

impl Row {
    /// A figure alone.
    pub fn new(what: impl Into<String>, unit: Unit, ours: impl Into<Option<f64>>) -> Self {
        Self { what: what.into(), unit, ours: ours.into(), peer: None, ratio: None, limits: None }
    }

    /// Beside a peer's.
    pub fn against(
        self,
        peer: impl Into<String>,
        theirs: impl Into<Option<f64>>,
        ratio: Option<f64>,
    ) -> Self {
        Self { peer: Some((peer.into(), theirs.into())), ratio, ..self }
    }

    /// With limits, if they apply.
    pub fn limits(self, limits: Option<Limits>) -> Self {
        Self { limits, ..self }
    }

    /// `aim`, `must`, `missed` or [`NOT_MEASURED`]; nothing where nothing was asked.
    pub fn verdict(&self) -> &'static str {
        let (value, [must, aim]) = match self.limits {
            None => return "",
            Some(Limits::AtMost(limits)) => (self.ours, limits),
            Some(Limits::RatioAtMost(limits)) => (self.ratio, limits),
            // With signs changed, "at least" is "at most".
            Some(Limits::RatioAtLeast([must, aim])) => (self.ratio.map(|r| -r), [-must, -aim]),
        };
        match value {
            None => NOT_MEASURED,
            Some(value) if value <= aim => "aim",
            Some(value) if value <= must => "must",
            Some(_) => "missed",
        }
    }

    /// What is not as it must be, in words.
    pub fn complaint(&self) -> Option<String> {
        let verdict = self.verdict();
        let than = self.peer.as_ref().map_or_else(String::new, |(peer, _)| format!(" against {peer}"));
        let unmet = verdict == "missed" || verdict == NOT_MEASURED;
        unmet.then(|| format!("{}{than}: {verdict}, must be {}", self.what, self.asked()[0]))
    }

    fn asked(&self) -> [String; 2] {
        match self.limits {
            None => Default::default(),
            Some(Limits::RatioAtMost(limits)) => limits.map(|limit| format!("≤ {limit:.2}")),
            Some(Limits::RatioAtLeast(limits)) => limits.map(|limit| format!("≥ {limit:.2}×")),
            Some(Limits::AtMost(limits)) => {
                limits.map(|limit| format!("≤ {}", self.unit.format(Some(limit))))
            }
        }
    }

    fn cells(&self) -> Vec<String> {
        let [must, aim] = self.asked();
        let peer = self.peer.as_ref();
        vec![
            self.what.clone(),
            self.unit.format(self.ours),
            peer.map_or_else(String::new, |(name, theirs)| format!("{} ({name})", self.unit.format(*theirs))),
            self.ratio.map_or_else(String::new, |ratio| format!("{ratio:.3}")),
            must,
            aim,
            self.verdict().into(),
        ]
    }

    /// For the report.
    pub fn json(&self) -> Value {
        let [must, aim] = self.asked();
        let (peer, theirs) = self.peer.clone().unzip();
        let theirs = theirs.flatten();
        json!({
            "what": self.what, "unit": format!("{:?}", self.unit).to_lowercase(), "ours": self.ours, "peer": peer,
            "theirs": theirs, "ratio": self.ratio, "must": must, "aim": aim, "verdict": self.verdict(),
        })
    }
}

/// In a line of its own.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cells = self.cells();
        let said: Vec<&str> = cells.iter().map(String::as_str).filter(|cell| !cell.is_empty()).collect();
        f.write_str(&said.join(" | "))
    }
}

/// The rows, under their heading.
pub fn table(rows: &[Row]) -> String {
    let heading = ["what", "ours", "peer", "ratio", "must", "aim", "met"].map(String::from).to_vec();
    aligned(&heading, &rows.iter().map(Row::cells).collect::<Vec<_>>())
}

/// A Markdown table whose columns are aligned.
pub fn aligned(heading: &[String], rows: &[Vec<String>]) -> String {
    let columns = heading.len();
    let width = |column: usize| {
        std::iter::once(heading)
            .chain(rows.iter().map(Vec::as_slice))
            .map(|row| row[column].chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &[String]| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let rule: Vec<String> = widths.iter().map(|&width| "-".repeat(width)).collect();
    line(heading) + &line(&rule) + &rows.iter().map(|row| line(row)).collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts() {
        let row = |ratio, limits| {
            Row::new("x", Unit::Seconds, 3.0).against("p", 4.0, ratio).limits(limits).verdict()
        };
        let at_most = Some(Limits::RatioAtMost([0.75, 0.5]));
        assert_eq!(row(Some(0.5), at_most), "aim");
        assert_eq!(row(Some(0.75), at_most), "must");
        assert_eq!(row(Some(0.76), at_most), "missed");
        assert_eq!(row(None, at_most), "not measured");
        let at_least = Some(Limits::RatioAtLeast([1.8, 1.95]));
        assert_eq!([1.95, 1.8, 1.7].map(|r| row(Some(r), at_least)), ["aim", "must", "missed"]);
        assert_eq!(row(None, Some(Limits::AtMost([6.5, 2.0]))), "must");
        assert_eq!(row(None, None), "");
    }

    #[test]
    fn what_must_be_and_is_not_is_complained_of() {
        let limits = Some(Limits::AtMost([2.0, 1.0]));
        let complaint = |ours: Option<f64>| Row::new("x", Unit::Seconds, ours).limits(limits).complaint();
        assert_eq!(complaint(Some(2.0)), None);
        assert_eq!(complaint(Some(3.0)).unwrap(), "x: missed, must be ≤ 2.00 s");
        let row = Row::new("x", Unit::Seconds, 3.0).against("p", None, None);
        assert_eq!(row.complaint(), None);
        let row = row.limits(Some(Limits::RatioAtMost([0.5, 0.2])));
        assert_eq!(row.complaint().unwrap(), "x against p: not measured, must be ≤ 0.50");
    }

    #[test]
    fn a_table_is_aligned_and_says_units() {
        let rows = [
            Row::new("step", Unit::Seconds, 0.0123)
                .against("PyTorch", 1.5, Some(0.0082))
                .limits(Some(Limits::RatioAtMost([0.75, 0.5]))),
            Row::new("peak", Unit::Gigabytes, 2.25).limits(Some(Limits::AtMost([3.0, 2.0]))),
        ];
        let expected = "\
| what | ours     | peer             | ratio | must      | aim       | met  |
| ---- | -------- | ---------------- | ----- | --------- | --------- | ---- |
| step | 12.30 ms | 1.50 s (PyTorch) | 0.008 | ≤ 0.75    | ≤ 0.50    | aim  |
| peak | 2.25 GB  |                  |       | ≤ 3.00 GB | ≤ 2.00 GB | must |
";
        assert_eq!(table(&rows), expected);
    }
}
