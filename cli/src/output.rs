//! What goes to standard output, in the format asked for.

use std::io::{self, ErrorKind, Write};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use crate::{
    args::{Format, Global},
    error::Failure,
};

/// Something that can be shown in every format.
pub(crate) trait Show: Serialize {
    /// For people; `wide` has more columns.
    fn table(&self, wide: bool) -> String;

    /// One name a line, for scripts.
    fn names(&self) -> Vec<String>;
}

/// Writes `document` to standard output.
pub(crate) fn show(global: &Global, document: &impl Show) -> Result<(), Failure> {
    print(&render(global.output, document)?)
}

pub(crate) fn render(format: Format, document: &impl Show) -> Result<String, Failure> {
    match format {
        Format::Table => Ok(document.table(false)),
        Format::Wide => Ok(document.table(true)),
        Format::Json => json(document),
        Format::Yaml => yaml(document),
        Format::Name => {
            Ok(document.names().into_iter().map(|name| printable(&name) + "\n").collect())
        }
        Format::Hosts => Err(Failure::usage("-o hosts is for `skctl service list` only")),
    }
}

pub(crate) fn json(document: &impl Serialize) -> Result<String, Failure> {
    serde_json::to_string_pretty(document)
        .map(|text| text + "\n")
        .map_err(|error| Failure::new("cannot write JSON").because(error))
}

pub(crate) fn yaml(document: &impl Serialize) -> Result<String, Failure> {
    let options = serde_saphyr::ser_options! { empty_as_braces: true };
    serde_saphyr::to_string_with_options(document, options)
        .map(|text| if text.ends_with('\n') { text } else { text + "\n" })
        .map_err(|error| Failure::new("cannot write YAML").because(error))
}

/// Writes `text` to standard output; a reader that has seen enough (`| head`) is no failure.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::new("cannot write to standard output").because(error))
        }
        _ => Ok(()),
    }
}

/// Tells something beside the result, on standard error; not with `-q`.
pub(crate) fn note(global: &Global, text: impl std::fmt::Display) {
    if !global.quiet {
        // Whether standard error can be written to is not for this command to mend.
        let _ = writeln!(io::stderr(), "{}", printable(&text.to_string()));
    }
}

/// Columns under headings, two spaces apart.
pub(crate) fn columns<const N: usize>(
    headings: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(headings);
    for row in rows {
        table.add_row(
            row.map(|cell| if cell.is_empty() { "-".to_owned() } else { printable(&cell) }),
        );
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.to_string().lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// Names come from other sites: whatever could command a terminal is replaced.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' | '\t' => c,
            // Direction overrides make a line read differently from what it says.
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
            c if c.is_control() => '\u{fffd}',
            c => c,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_end_clean() {
        let rows = [["a".into(), String::new()], ["longer".into(), "x\u{1b}[31m".into()]];
        assert_eq!(columns(["NAME", "B"], rows), "NAME    B\na       -\nlonger  x\u{fffd}[31m\n");
    }
}
