//! Medians over rounds, as a Markdown table or as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Figure {
    /// Of what.
    pub name: &'static str,
    /// In what.
    pub unit: &'static str,
}

/// Figures by row and column, in the order they first came.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Figure>,
    cells: BTreeMap<(usize, usize), Vec<f64>>,
}

/// A row as JSON has it.
#[derive(Debug, Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    figure: Figure,
    cells: BTreeMap<&'a str, Cell<'a>>,
}

/// The figures of one way, a round each.
#[derive(Debug, Serialize)]
struct Cell<'a> {
    median: f64,
    rounds: &'a [f64],
}

impl Table {
    /// Adds one round's figure.
    pub fn add(&mut self, figure: Figure, column: usize, value: f64) {
        let index = self.rows.iter().position(|known| *known == figure).unwrap_or_else(|| {
            self.rows.push(figure);
            self.rows.len() - 1
        });
        self.cells.entry((index, column)).or_default().push(value);
    }

    /// The table; each cell is the median and, of more than one round, the range.
    #[must_use]
    pub fn markdown(&self, columns: &[&str]) -> String {
        let mut text =
            format!("| | {} |\n|---|{}\n", columns.join(" | "), "---|".repeat(columns.len()));
        for (index, Figure { name, unit }) in self.rows.iter().enumerate() {
            // Writing to a String cannot fail.
            let _ = write!(text, "| {name}, {unit} |");
            for column in 0..columns.len() {
                let _ = write!(text, " {} |", self.cell(index, column));
            }
            text.push('\n');
        }
        text
    }

    /// The rows as JSON, with the figure of every round; columns are called as given.
    ///
    /// # Errors
    /// When a figure is no number that JSON knows.
    pub fn json(&self, columns: &[String]) -> serde_json::Result<String> {
        let mut rows = Vec::new();
        for (row, figure) in self.rows.iter().enumerate() {
            let mut cells = BTreeMap::new();
            for (column, name) in columns.iter().enumerate() {
                if let Some(rounds) = self.cells.get(&(row, column)) {
                    let cell = Cell { median: median(rounds), rounds };
                    cells.insert(name.as_str(), cell);
                }
            }
            rows.push(Row { figure: *figure, cells });
        }
        serde_json::to_string_pretty(&rows)
    }

    fn cell(&self, row: usize, column: usize) -> String {
        let Some(values) = self.cells.get(&(row, column)) else { return "–".to_owned() };
        let first = values.iter().copied().fold(f64::INFINITY, f64::min);
        let last = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        match values[..] {
            [only] => format!("{only:.2}"),
            _ => format!("{:.2} [{first:.2}–{last:.2}]", median(values)),
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::{Figure, Table};

    const A: Figure = Figure { name: "a", unit: "ms" };
    const B: Figure = Figure { name: "b", unit: "s" };

    fn table() -> Table {
        let mut table = Table::default();
        for value in [3.0, 1.0, 2.0] {
            table.add(A, 1, value);
        }
        table.add(B, 0, 5.0);
        table
    }

    #[test]
    fn a_cell_is_the_median_with_its_range() {
        assert_eq!(
            table().markdown(&["x", "y"]),
            "| | x | y |\n|---|---|---|\n| a, ms | – | 2.00 [1.00–3.00] |\n| b, s | 5.00 | – |\n"
        );
    }

    #[test]
    fn json_has_every_round() -> serde_json::Result<()> {
        let json: serde_json::Value =
            serde_json::from_str(&table().json(&["x".into(), "y".into()])?)?;
        let expected = serde_json::json!([
            {"name": "a", "unit": "ms", "cells": {"y": {"median": 2.0, "rounds": [3.0, 1.0, 2.0]}}},
            {"name": "b", "unit": "s", "cells": {"x": {"median": 5.0, "rounds": [5.0]}}},
        ]);
        assert_eq!(json, expected);
        Ok(())
    }
}
