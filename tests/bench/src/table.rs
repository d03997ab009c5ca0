//! Medians over rounds, as a Markdown table.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Figures by row and column, in the order they first came.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<&'static str>,
    cells: BTreeMap<(usize, usize), Vec<f64>>,
}

impl Table {
    /// Adds one round's figure.
    pub fn add(&mut self, row: &'static str, column: usize, value: f64) {
        let index = self.rows.iter().position(|known| *known == row).unwrap_or_else(|| {
            self.rows.push(row);
            self.rows.len() - 1
        });
        self.cells.entry((index, column)).or_default().push(value);
    }

    /// The table; each cell is the median and, of more than one round, the range.
    #[must_use]
    pub fn markdown(&self, columns: &[&str]) -> String {
        let mut text =
            format!("| | {} |\n|---|{}\n", columns.join(" | "), "---|".repeat(columns.len()));
        for (index, row) in self.rows.iter().enumerate() {
            // Writing to a String cannot fail.
            let _ = write!(text, "| {row} |");
            for column in 0..columns.len() {
                let _ = write!(text, " {} |", self.cell(index, column));
            }
            text.push('\n');
        }
        text
    }

    fn cell(&self, row: usize, column: usize) -> String {
        let Some(values) = self.cells.get(&(row, column)) else { return "–".to_owned() };
        let mut sorted = values.clone();
        sorted.sort_by(f64::total_cmp);
        let median = sorted[sorted.len() / 2];
        match sorted[..] {
            [first, .., last] => format!("{median:.2} [{first:.2}–{last:.2}]"),
            _ => format!("{median:.2}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Table;

    #[test]
    fn a_cell_is_the_median_with_its_range() {
        let mut table = Table::default();
        for value in [3.0, 1.0, 2.0] {
            table.add("a", 1, value);
        }
        table.add("b", 0, 5.0);
        assert_eq!(
            table.markdown(&["x", "y"]),
            "| | x | y |\n|---|---|---|\n| a | – | 2.00 [1.00–3.00] |\n| b | 5.00 | – |\n"
        );
    }
}
