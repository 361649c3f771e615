//! Text in columns. Must not know what it shows.

/// Rows of cells below a heading.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    /// Columns that hold numbers, which end together.
    numbers: Vec<bool>,
}

impl Table {
    /// A table without rows; a heading that begins with `>` is of numbers.
    pub(crate) fn new(headings: &[&str]) -> Self {
        let plain = |heading: &&str| heading.trim_start_matches('>').to_owned();
        Self {
            rows: vec![headings.iter().map(plain).collect()],
            numbers: headings.iter().map(|name| name.starts_with('>')).collect(),
        }
    }

    /// Appends a row.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    /// The text, a line for each row, without spaces at the ends of lines.
    pub(crate) fn text(&self) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.numbers.len()).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let cells = row.iter().zip(&widths).zip(&self.numbers);
            let padded = cells.map(|((cell, &width), &number)| match number {
                true => format!("{cell:>width$}"),
                false => format!("{cell:<width$}"),
            });
            let line = padded.collect::<Vec<_>>().join("  ");
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_below_their_headings() {
        let mut table = Table::new(&["NAME", ">SIZE", "STATE"]);
        table.row(["a".to_owned(), "5".to_owned(), String::new()]);
        table.row(["longer".to_owned(), "12345".to_owned(), "on".to_owned()]);
        assert_eq!(
            table.text(),
            "NAME     SIZE  STATE\na           5\nlonger  12345  on\n"
        );
    }
}
