//! Which branches of the chart's templates a set of values goes through.
//!
//! Owns: a copy of the chart in which each branch that was not seen yet ends the rendering with its number. helm has no other
//! way to tell. Must not: know what the chart renders.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::chart;

const MARK: &str = "untaken branch ";

/// A template, cut where branches begin.
struct Template {
    path: PathBuf,
    /// Text, and the branch that begins after it.
    pieces: Vec<(String, Option<usize>)>,
}

/// The chart's templates with all their branches.
pub struct Branches {
    templates: Vec<Template>,
    names: Vec<String>,
    unseen: BTreeSet<usize>,
    chart: tempfile::TempDir,
}

/// An `if`, `with` or `range` whose `end` is yet to come; `None` for a `define`.
struct Open {
    name: Option<String>,
    has_else: bool,
}

/// Cuts a template; branches are numbered on from `names`.
fn cut(file: &str, text: &str, names: &mut Vec<String>) -> Result<Vec<(String, Option<usize>)>> {
    let mut pieces = vec![];
    let mut piece = String::new();
    let mut open: Vec<Open> = vec![];
    let mut rest = text;
    let mut begin = |piece: &mut String, names: &mut Vec<String>, name: String| {
        pieces.push((std::mem::take(piece), Some(names.len())));
        names.push(name);
    };
    while let Some((before, from)) = rest.split_once("{{") {
        let (tag, after) = from
            .split_once("}}")
            .with_context(|| format!("{file}: a tag without its end"))?;
        piece += before;
        let words = tag.trim_start_matches('-').trim_end_matches('-').trim();
        let keyword = words.split_whitespace().next().unwrap_or_default();
        let trim = if tag.starts_with('-') { "-" } else { "" };
        match keyword {
            "if" | "with" | "range" => {
                let line = text.lines().count() - from.lines().count() + 1;
                let name = format!("{file}:{line}: {words}");
                piece += &format!("{{{{{tag}}}}}");
                begin(&mut piece, names, name.clone());
                open.push(Open {
                    name: Some(name),
                    has_else: false,
                });
            }
            "else" => {
                ensure!(words == "else", "{file}: {words} is not understood here");
                let block = open.last_mut().context("an else without a beginning")?;
                block.has_else = true;
                let name = block.name.as_deref().context("an else in a define")?;
                piece += &format!("{{{{{tag}}}}}");
                begin(&mut piece, names, format!("not {name}"));
            }
            "end" => {
                let block = open.pop().context("an end without a beginning")?;
                if let Some(name) = block.name.filter(|_| !block.has_else) {
                    piece += &format!("{{{{{trim} else }}}}");
                    begin(&mut piece, names, format!("not {name}"));
                }
                piece += &format!("{{{{{tag}}}}}");
            }
            "define" => {
                open.push(Open {
                    name: None,
                    has_else: false,
                });
                piece += &format!("{{{{{tag}}}}}");
            }
            _ => piece += &format!("{{{{{tag}}}}}"),
        }
        rest = after;
    }
    ensure!(open.is_empty(), "{file}: a block without its end");
    pieces.push((piece + rest, None));
    Ok(pieces)
}

impl Branches {
    /// All branches of the chart, none of them seen.
    pub fn new() -> Result<Self> {
        let chart = tempfile::tempdir()?;
        let files = chart::copy(chart.path())?;
        let (mut templates, mut names) = (vec![], vec![]);
        for path in files {
            let name = path.strip_prefix(chart.path())?.display().to_string();
            if name.starts_with("templates/") {
                let pieces = cut(&name, &std::fs::read_to_string(&path)?, &mut names)?;
                templates.push(Template { path, pieces });
            }
        }
        let unseen = (0..names.len()).collect();
        let new = Self {
            templates,
            names,
            unseen,
            chart,
        };
        for template in &new.templates {
            new.write(template)?;
        }
        Ok(new)
    }

    fn write(&self, template: &Template) -> Result<()> {
        let mut text = String::new();
        for (piece, branch) in &template.pieces {
            text += piece;
            if let Some(branch) = branch.filter(|branch| self.unseen.contains(branch)) {
                text += &format!("{{{{ fail \"{MARK}{branch};\" }}}}");
            }
        }
        std::fs::write(&template.path, text)?;
        Ok(())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.names.len()
    }

    /// Renders the chart as that release, and remembers each branch that this goes through. Values that the chart refuses are
    /// fine: a refusal is a branch.
    pub async fn take(&mut self, release: &str, values: &Value) -> Result<()> {
        let file = self.chart.path().join("values-of-the-case.json");
        std::fs::write(&file, values.to_string())?;
        loop {
            let rendered = chart::helm(&[
                "template".as_ref(),
                release.as_ref(),
                self.chart.path().as_os_str(),
                chart::KUBE_VERSION.as_ref(),
                "--values".as_ref(),
                file.as_os_str(),
            ])
            .await;
            let said = match rendered {
                Ok(_) => return Ok(()),
                Err(error) => error.to_string(),
            };
            let Some((number, _)) = said
                .rsplit_once(MARK)
                .and_then(|(_, after)| after.split_once(';'))
            else {
                return Ok(());
            };
            let number = number.parse()?;
            if !self.unseen.remove(&number) {
                bail!("branch {number} was seen twice: {said}");
            }
            let within =
                |template: &&Template| template.pieces.iter().any(|(_, branch)| *branch == Some(number));
            let template = self.templates.iter().find(within).context("an unknown branch")?;
            self.write(template)?;
        }
    }

    /// The branches that no set of values went through.
    pub fn unseen(&self) -> BTreeSet<&str> {
        self.unseen
            .iter()
            .filter_map(|branch| self.names.get(*branch))
            .map(String::as_str)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_branch_begins_after_each_beginning_and_where_an_end_has_no_else() {
        let mut names = vec![];
        let text =
            "a\n{{- if .x }}b{{ else }}c{{ end }}\n{{ with .y -}} d {{- end }}{{ define \"e\" }}{{ end }}";
        let pieces = cut("t", text, &mut names).unwrap();
        assert_eq!(
            names,
            ["t:2: if .x", "not t:2: if .x", "t:3: with .y", "not t:3: with .y"]
        );
        let joined: String = pieces.iter().map(|(piece, _)| piece.as_str()).collect();
        assert_eq!(joined, text.replace(" d {{- end", " d {{- else }}{{- end"));
    }
}
