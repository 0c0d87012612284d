//! A program's flags as a page.

use crate::{cell, heading};
use clap::{Arg, ArgAction, Command};

/// The page of `command`, whose flags stand in `source`.
pub fn flags_page(command: &Command, source: &str) -> String {
    let name = command.get_name();
    let mut page = heading(&format!("Flags of {name}"), source);
    page += "| flag | default | environment | what |\n| --- | --- | --- | --- |\n";
    let mut flags: Vec<&Arg> = command
        .get_arguments()
        .filter(|flag| flag.get_long().is_some() && !flag.is_hide_set())
        .collect();
    flags.sort_by_key(|flag| flag.get_long());
    for flag in flags {
        page += &row(flag);
    }
    page
}

fn row(flag: &Arg) -> String {
    let long = flag.get_long().unwrap_or_default();
    let values: Vec<String> = flag
        .get_possible_values()
        .iter()
        .map(|value| value.get_name().to_owned())
        .collect();
    let value = match (flag.get_action().takes_values(), values.is_empty()) {
        (false, _) => String::new(),
        (true, true) => format!(
            " {}",
            flag.get_value_names()
                .and_then(|names| names.first())
                .map_or("VALUE", |name| name.as_str())
        ),
        (true, false) => format!(" {}", values.join("\\|")),
    };
    let code = |text: &str| {
        if text.is_empty() {
            String::new()
        } else {
            format!("`{text}`")
        }
    };
    let defaults: Vec<String> = flag
        .get_default_values()
        .iter()
        .map(|value| value.to_string_lossy().into_owned())
        .collect();
    let default = if flag.is_required_set() {
        "required".to_owned()
    } else {
        code(&defaults.join(", "))
    };
    let environment = flag
        .get_env()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let help = flag.get_help().map(ToString::to_string).unwrap_or_default();
    let repeats = if matches!(flag.get_action(), ArgAction::Append) && !help.contains("repeat") {
        " Repeatable."
    } else {
        ""
    };
    format!(
        "| `--{long}{value}` | {default} | {} | {}{repeats} |\n",
        code(&environment),
        sentence(&cell(&help))
    )
}

/// Clap takes the full stop off a help text.
fn sentence(text: &str) -> String {
    if text.ends_with('.') {
        text.to_owned()
    } else {
        format!("{text}.")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_shows_its_values_default_and_variable_and_a_hidden_one_does_not_show() {
        let command = Command::new("p")
            .arg(
                Arg::new("form")
                    .long("form")
                    .value_parser(["a", "b"])
                    .default_value("a")
                    .help("Form"),
            )
            .arg(Arg::new("fault").long("fault").hide(true))
            .arg(
                Arg::new("root")
                    .long("root")
                    .action(ArgAction::Append)
                    .required(true)
                    .help("Where. Or: x|y."),
            );
        let page = flags_page(&command, "here");
        let rows: Vec<&str> = page.lines().skip(6).collect();
        assert_eq!(
            rows,
            [
                "| `--form a\\|b` | `a` |  | Form. |",
                "| `--root VALUE` | required |  | Where. Or: x\\|y. Repeatable. |"
            ]
        );
    }
}
