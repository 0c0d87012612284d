//! Alerts, dashboards and runbooks speak of what is exported, and every alert fires and clears.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends by panicking"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use gogrid_tests::cluster::repository;
use gogrid_tests::prometheus::promtool;
use serde_json::Value;

const RULES: &str = "charts/gogrid/files/alerts.yaml";
const RULE_TESTS: &str = "tests/alerts/tests.yaml";
const SECTIONS: [&str; 4] = ["## Meaning", "## Impact", "## Diagnosis", "## Mitigation"];
/// What Prometheus and the PodMonitors add to every series.
const OF_THE_SCRAPE: [&str; 5] = ["instance", "job", "pod", "node", "namespace"];

fn text_of(path: &str) -> String {
    let path: PathBuf = repository().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn yaml_of(path: &str) -> Value {
    serde_yaml::from_str(&text_of(path)).unwrap()
}

/// Every exported name with its labels, from the pages that are generated from the programs.
fn exported() -> BTreeMap<String, BTreeSet<String>> {
    let mut found = BTreeMap::new();
    for program in ["operator", "agent"] {
        let page = text_of(&format!("docs/reference/metrics-{program}.md"));
        for row in page.lines().filter(|line| line.starts_with("| `")) {
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            let name = cells[1].trim_matches('`');
            let mut labels: BTreeSet<String> = cells[3]
                .split(", ")
                .map(|label| label.trim_matches('`').to_owned())
                .filter(|label| !label.is_empty())
                .collect();
            if cells[2] == "histogram" {
                labels.insert("le".to_owned());
                for suffix in ["_bucket", "_sum", "_count"] {
                    found.insert(format!("{name}{suffix}"), labels.clone());
                }
            } else {
                found.insert(name.to_owned(), labels);
            }
        }
    }
    found
}

/// The metrics in an expression, each with the labels that its braces select by.
fn metrics_in(expression: &str) -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    for prefix in ["gogrid_", "gen_ai_"] {
        for (at, _) in expression.match_indices(prefix) {
            if expression[..at].ends_with(is_name) {
                continue;
            }
            let rest = &expression[at..];
            let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
            let labels = rest[end..]
                .strip_prefix('{')
                .and_then(|selector| selector.split('}').next())
                .unwrap_or_default()
                .split(',')
                .filter_map(|matcher| matcher.split(['=', '!', '~']).next())
                .map(|label| label.trim().to_owned())
                .filter(|label| !label.is_empty())
                .collect();
            found.push((rest[..end].to_owned(), labels));
        }
    }
    found
}

/// What is wrong with an expression that `place` has.
fn strange(place: &str, expression: &str, exported: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    let metrics = metrics_in(expression);
    if metrics.is_empty() {
        return vec![format!("{place}: {expression} asks for nothing of GoGrid's")];
    }
    let mut wrong = Vec::new();
    for (name, labels) in metrics {
        let Some(known) = exported.get(&name) else {
            wrong.push(format!("{place}: nobody exports {name}"));
            continue;
        };
        for label in labels {
            if !known.contains(&label) && !OF_THE_SCRAPE.contains(&label.as_str()) {
                wrong.push(format!("{place}: {name} has no label {label}"));
            }
        }
    }
    wrong
}

fn alerts() -> Vec<Value> {
    let rules = yaml_of(RULES);
    let groups = rules["groups"].as_array().unwrap().clone();
    groups
        .iter()
        .flat_map(|group| group["rules"].as_array().unwrap().clone())
        .collect()
}

fn name_of(alert: &Value) -> String {
    alert["alert"].as_str().unwrap().to_owned()
}

#[test]
fn every_alert_asks_for_what_is_exported() {
    let exported = exported();
    let alerts = alerts();
    assert!(alerts.len() >= 14, "{} alerts", alerts.len());
    let wrong: Vec<String> = alerts
        .iter()
        .flat_map(|alert| strange(&name_of(alert), alert["expr"].as_str().unwrap(), &exported))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_query_of_a_dashboard_asks_for_what_is_exported() {
    let exported = exported();
    let dashboards = repository().join("charts/gogrid/files/dashboards");
    let mut wrong = Vec::new();
    let mut queries = 0;
    for entry in std::fs::read_dir(dashboards).unwrap() {
        let path = entry.unwrap().path();
        let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert!(dashboard["uid"].is_string() && dashboard["title"].is_string());
        for panel in dashboard["panels"].as_array().unwrap() {
            let place = format!("{} {}", path.file_name().unwrap().display(), panel["title"]);
            for target in panel["targets"].as_array().into_iter().flatten() {
                queries += 1;
                wrong.extend(strange(&place, target["expr"].as_str().unwrap(), &exported));
            }
        }
    }
    assert!(queries >= 20, "{queries} queries");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn an_unknown_name_or_label_is_found_out() {
    let exported = exported();
    let wrong = |expression: &str| strange("here", expression, &exported);
    assert_eq!(wrong("max(gogrid_leader) == 0"), Vec::<String>::new());
    assert_eq!(
        wrong("gogrid_leaders > 0"),
        ["here: nobody exports gogrid_leaders"]
    );
    assert_eq!(
        wrong(r#"rate(gogrid_jobs_finished_total{reason="x"}[5m])"#),
        ["here: gogrid_jobs_finished_total has no label reason"]
    );
    assert_eq!(wrong("up == 0").len(), 1);
}

#[test]
fn every_alert_has_a_severity_a_summary_and_a_runbook_with_its_four_sections() {
    let mut named = BTreeSet::new();
    for alert in alerts() {
        let name = name_of(&alert);
        let severity = alert["labels"]["severity"].as_str().unwrap();
        assert!(["critical", "warning"].contains(&severity), "{name}: {severity}");
        for annotation in ["summary", "description"] {
            assert!(
                alert["annotations"][annotation].is_string(),
                "{name}: {annotation}"
            );
        }
        let page = format!("docs/runbooks/{name}.md");
        assert_eq!(alert["annotations"]["runbook_url"], page.as_str());
        let text = text_of(&page);
        let sections: Vec<&str> = text.lines().filter(|line| line.starts_with("## ")).collect();
        assert_eq!(sections, SECTIONS, "{page}");
        named.insert(format!("{name}.md"));
    }
    let pages: BTreeSet<String> = std::fs::read_dir(repository().join("docs/runbooks"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    assert_eq!(pages, named, "a page without an alert, or the other way round");
}

#[test]
fn every_alert_is_tried_firing_and_clear() {
    let tests = yaml_of(RULE_TESTS);
    let mut tried: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for test in tests["tests"].as_array().unwrap() {
        for at in test["alert_rule_test"].as_array().unwrap() {
            let counts = tried
                .entry(at["alertname"].as_str().unwrap().to_owned())
                .or_default();
            if at["exp_alerts"].is_array() {
                counts.0 += 1;
            } else {
                counts.1 += 1;
            }
        }
    }
    for alert in alerts() {
        let (firing, clear) = tried.get(&name_of(&alert)).copied().unwrap_or_default();
        assert!(
            firing >= 1 && clear >= 2,
            "{}: {firing} firing, {clear} clear: before and after are needed",
            name_of(&alert)
        );
    }
    promtool(&["check", "rules", RULES]).unwrap();
    promtool(&["test", "rules", RULE_TESTS]).unwrap();
}
