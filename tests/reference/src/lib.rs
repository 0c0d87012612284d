//! Reference pages made from code.
//!
//! Owns: the comparison of a generated file with what is committed, and how flags and metrics read as a page. Must not:
//! know any flag or metric; the crates that have them hand them over in a test of theirs.

mod flags;
mod metrics;

pub use flags::flags_page;
pub use metrics::metrics_page;

use std::path::{Path, PathBuf};

/// The top of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Compares a generated file, named from the top of the repository, with what it should hold; `UPDATE=1` writes it instead.
///
/// # Panics
/// When they differ, naming the first line that does.
pub fn compare(file: &str, wanted: &str) {
    let path = root().join(file);
    #[expect(
        clippy::disallowed_methods,
        reason = "UPDATE=1 is this project's switch to rewrite generated files"
    )]
    let update = std::env::var("UPDATE").is_ok_and(|value| value == "1");
    if update {
        write(&path, wanted);
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = wanted
        .lines()
        .zip(found.lines().map(Some).chain(std::iter::repeat(None)))
        .position(|(wanted, found)| Some(wanted) != found)
        .unwrap_or_else(|| wanted.lines().count());
    assert!(
        found == wanted,
        "{file} differs from line {}, which should read {:?}: run the failing test again with UPDATE=1 and commit the file",
        differs + 1,
        wanted.lines().nth(differs).unwrap_or("(nothing more)")
    );
}

fn write(path: &Path, text: &str) {
    let written = path
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| std::fs::write(path, text));
    assert!(written.is_ok(), "writing {}: {written:?}", path.display());
}

/// The first lines of every generated page.
pub fn heading(title: &str, source: &str) -> String {
    format!("<!-- Generated from {source}: a test compares it, UPDATE=1 rewrites it. -->\n\n# {title}\n\n")
}

/// Text that can stand in a cell of a table.
pub fn cell(text: &str) -> String {
    text.split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .replace('|', "\\|")
}
