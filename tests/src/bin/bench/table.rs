//! What was measured, each figure beside its target.

/// All rows, in the order in which they were measured.
#[derive(Default)]
pub(crate) struct Table(Vec<Row>);

/// One figure.
pub(crate) struct Row {
    /// What was measured.
    pub(crate) what: String,
    /// What came out, with its unit.
    pub(crate) figure: String,
    /// What should have come out, where something should.
    pub(crate) target: Option<Target>,
}

/// What a figure should be, and whether it is.
pub(crate) struct Target {
    words: String,
    is_met: bool,
}

/// At least this.
pub(crate) fn at_least(target: f64, figure: f64) -> Target {
    Target { words: format!(">= {target}"), is_met: figure >= target }
}

/// At most this, in this unit.
pub(crate) fn at_most(target: f64, unit: &str, figure: f64) -> Target {
    Target { words: format!("<= {target} {unit}"), is_met: figure <= target }
}

impl Table {
    pub(crate) fn push(&mut self, row: Row) {
        self.0.push(row);
    }

    /// For a person.
    pub(crate) fn print(&self) {
        let width = |of: fn(&Row) -> &str| self.0.iter().map(|row| of(row).chars().count()).max().unwrap_or(0);
        let (whats, figures) = (width(|row| &row.what), width(|row| &row.figure));
        for Row { what, figure, target } in &self.0 {
            let judged = target
                .as_ref()
                .map(|target| format!("{:<12} {}", target.words, if target.is_met { "pass" } else { "MISS" }));
            println!("{}", format!("{what:<whats$}  {figure:<figures$}  {}", judged.unwrap_or_default()).trim_end());
        }
    }
}
