//! What the design says of the code's shape, checked against the code: who may depend on whom, what a pure crate may
//! reach, how long a file may be, and what must not be written in one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends by panicking"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Every crate and the crates of ours it may depend on. A new crate finds its floor here first.
const ARROWS: [(&str, &[&str]); 14] = [
    ("gogrid-api", &[]),
    ("gogrid-gguf", &[]),
    ("gogrid-store", &[]),
    ("gogrid-planner", &["gogrid-api", "gogrid-gguf"]),
    ("gogrid-agent-core", &["gogrid-api"]),
    ("gogrid-worker", &["gogrid-gguf", "gogrid-agent-core"]),
    (
        "gogrid-operator",
        &["gogrid-planner", "gogrid-api", "gogrid-gguf", FAULTS],
    ),
    (
        "gogrid-agent",
        &[
            "gogrid-agent-core",
            "gogrid-store",
            "gogrid-gguf",
            "gogrid-api",
            FAULTS,
        ],
    ),
    (FAULTS, &[]),
    ("kubectl-gogrid", &["gogrid-api", "gogrid-planner"]),
    ("gogrid-testmodels", &[]),
    ("gogrid-reference", &[]),
    ("gogrid-simnvml", &[]),
    (
        SCENARIOS,
        &[
            "gogrid-api",
            "gogrid-agent",
            "gogrid-agent-core",
            "gogrid-gguf",
            "gogrid-operator",
            "gogrid-planner",
            "gogrid-reference",
            "gogrid-simnvml",
            "gogrid-testmodels",
        ],
    ),
];
/// Faults at chosen requests: behind a feature that no release has.
const FAULTS: &str = "gogrid-faults";
/// The crate of scenarios: it may see every library, and no crate may see it.
const SCENARIOS: &str = "gogrid-tests";
/// What any crate's own tests may use besides.
const FOR_TESTS: [&str; 2] = ["gogrid-testmodels", "gogrid-reference"];
/// Crates that decide and never act, with what would let them act.
const PURE: [&str; 4] = ["gogrid-api", "gogrid-gguf", "gogrid-planner", "gogrid-agent-core"];
const EFFECTS: [&str; 11] = [
    "tokio",
    "async-std",
    "mio",
    "hyper",
    "reqwest",
    "kube-client",
    "kube-runtime",
    "tower",
    "candle-core",
    "rand",
    "rustix",
];
const LONGEST_FILE: usize = 500;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()
        .unwrap()
}

fn output_of(program: &str, args: &[&str]) -> String {
    let ended = Command::new(program)
        .args(args)
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        ended.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&ended.stderr)
    );
    String::from_utf8(ended.stdout).unwrap()
}

fn cargo(args: &[&str]) -> String {
    output_of(env!("CARGO"), args)
}

/// Each workspace member's direct dependencies among workspace members, with the kind (`normal`, `dev` or `build`).
fn members() -> BTreeMap<String, Vec<(String, String)>> {
    let metadata: Value =
        serde_json::from_str(&cargo(&["metadata", "--no-deps", "--format-version=1"])).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let text = |value: &Value| value.as_str().unwrap_or("normal").to_owned();
    let ours: BTreeSet<String> = packages.iter().map(|package| text(&package["name"])).collect();
    packages
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"].as_array().unwrap().iter();
            let among_ours = dependencies
                .map(|dependency| (text(&dependency["name"]), text(&dependency["kind"])))
                .filter(|(name, _kind)| ours.contains(name))
                .collect();
            (text(&package["name"]), among_ours)
        })
        .collect()
}

/// The names of everything that is linked into `package`, with the features that it alone asks for.
fn linked_into(package: &str) -> BTreeSet<String> {
    let tree = cargo(&[
        "tree",
        "--package",
        package,
        "--edges=normal",
        "--prefix=none",
        "--format={p}",
    ]);
    tree.lines()
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

/// Every file that is committed or about to be.
fn tracked_files() -> Vec<PathBuf> {
    output_of("git", &["ls-files", "-z"])
        .split('\0')
        .filter(|name| !name.is_empty())
        .map(PathBuf::from)
        .collect()
}

fn text_of(file: &Path) -> Option<String> {
    // Deleted but not yet committed, or not text.
    std::fs::read_to_string(root().join(file)).ok()
}

#[test]
fn every_dependency_between_our_crates_is_an_arrow_of_the_design() {
    let arrows = BTreeMap::from(ARROWS);
    let mut breaches = Vec::new();
    for (package, dependencies) in members() {
        let Some(allowed) = arrows.get(package.as_str()) else {
            breaches.push(format!("{package} has no floor in the design"));
            continue;
        };
        for (name, kind) in dependencies {
            let for_tests = kind == "dev" && FOR_TESTS.contains(&name.as_str());
            if !allowed.contains(&name.as_str()) && !for_tests {
                breaches.push(format!("{package} -> {name} ({kind})"));
            }
        }
    }
    assert!(breaches.is_empty(), "{breaches:#?}");
}

#[test]
fn the_arrows_of_the_design_form_no_circle_and_none_points_at_the_tests() {
    let arrows = BTreeMap::from(ARROWS);
    let mut settled: BTreeSet<&str> = BTreeSet::new();
    loop {
        let ready: Vec<&str> = arrows
            .iter()
            .filter(|(name, needs)| {
                !settled.contains(*name) && needs.iter().all(|need| settled.contains(need))
            })
            .map(|(name, _needs)| *name)
            .collect();
        if ready.is_empty() {
            break;
        }
        settled.extend(ready);
    }
    assert_eq!(settled.len(), arrows.len(), "a circle among {:?}", arrows.keys());
    assert!(arrows.values().all(|needs| !needs.contains(&SCENARIOS)));
}

#[test]
fn a_crate_that_decides_links_nothing_that_could_act() {
    let mut breaches = Vec::new();
    for package in PURE {
        let linked = linked_into(package);
        assert!(linked.contains(package), "cargo tree knows no {package}");
        breaches.extend(
            EFFECTS
                .iter()
                .filter(|name| linked.contains(**name))
                .map(|name| format!("{package} links {name}")),
        );
    }
    assert!(breaches.is_empty(), "{breaches:#?}");
}

#[test]
fn only_the_worker_links_the_tensor_library() {
    for (package, _) in ARROWS
        .iter()
        .filter(|(name, _)| members().contains_key(*name) && *name != SCENARIOS)
    {
        let links = linked_into(package).contains("candle-core");
        assert_eq!(links, *package == "gogrid-worker", "{package}");
    }
}

#[test]
fn no_release_can_be_told_to_fail() {
    for package in ["gogrid-operator", "gogrid-agent"] {
        let linked = linked_into(package);
        assert!(linked.contains(package) && !linked.contains(FAULTS), "{package}");
    }
}

#[test]
fn the_worker_and_the_cli_link_no_more_than_they_need() {
    let worker = linked_into("gogrid-worker");
    for name in ["kube-client", "hyper", "reqwest", "tokio"] {
        assert!(
            !worker.contains(name),
            "the worker eats hostile files and must not link {name}"
        );
    }
}

#[test]
fn no_source_file_is_longer_than_five_hundred_lines_besides_its_tests() {
    let mut long = Vec::new();
    for file in tracked_files() {
        let is_source = file.extension().is_some_and(|extension| extension == "rs");
        // Integration tests lie in `<crate>/tests/`; the crate of scenarios is itself called tests.
        let inside = file.strip_prefix("tests").unwrap_or(&file);
        let is_test = inside.components().any(|part| part.as_os_str() == "tests");
        if is_source && !is_test {
            let lines = text_of(&file).map_or(0, |text| {
                text.lines().take_while(|line| *line != "#[cfg(test)]").count()
            });
            if lines > LONGEST_FILE {
                long.push(format!("{}: {lines}", file.display()));
            }
        }
    }
    assert!(long.is_empty(), "{long:#?}");
}

#[test]
fn nothing_is_left_to_do() {
    // Put together here, so that this file does not hold the words it looks for.
    let words = [
        ["TO", "DO"].concat(),
        ["FIX", "ME"].concat(),
        ["to", "do!("].concat(),
        ["unimple", "mented!("].concat(),
    ];
    let mut left = Vec::new();
    for file in tracked_files() {
        let looked_at = ["rs", "sh", "yaml", "toml", "tpl", "go"]
            .iter()
            .any(|known| file.extension().is_some_and(|e| e == *known));
        if looked_at {
            let text = text_of(&file).unwrap_or_default();
            for (number, line) in text.lines().enumerate() {
                if words.iter().any(|word| line.contains(word)) {
                    left.push(format!("{}:{}: {line}", file.display(), number + 1));
                }
            }
        }
    }
    assert!(left.is_empty(), "{left:#?}");
}

/// Hosts that this machine fetches packages from, where they are not the public ones that everybody has.
fn private_hosts() -> BTreeSet<String> {
    const PUBLIC: [&str; 9] = [
        "crates.io",
        "index.crates.io",
        "static.crates.io",
        "github.com",
        "proxy.golang.org",
        "sum.golang.org",
        "pypi.org",
        "localhost",
        "127.0.0.1",
    ];
    #[expect(clippy::disallowed_methods, reason = "asks what this machine is set up with")]
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let home = PathBuf::from(variable("HOME"));
    let cargo_home = Some(variable("CARGO_HOME"))
        .filter(|dir| !dir.is_empty())
        .map_or(home.join(".cargo"), PathBuf::from);
    let mut settings: Vec<String> = ["config.toml", "config"]
        .iter()
        .filter_map(|name| std::fs::read_to_string(cargo_home.join(name)).ok())
        .chain(
            ["etc/pip.conf", "etc/npmrc"]
                .iter()
                .filter_map(|name| std::fs::read_to_string(Path::new("/").join(name)).ok()),
        )
        .collect();
    settings.extend(["GOPROXY", "PIP_INDEX_URL", "UV_INDEX_URL", "NPM_CONFIG_REGISTRY"].map(variable));
    let hosts = settings
        .iter()
        .flat_map(|text| text.split("://").skip(1))
        .filter_map(|rest| {
            let authority = rest.split(['/', '"', '\'', ',', '|', '\n', ' ']).next()?;
            let host = authority.rsplit('@').next()?.split(':').next()?;
            Some(host.to_owned())
        });
    hosts
        .filter(|host| host.len() > 3 && !PUBLIC.contains(&host.as_str()))
        .collect()
}

#[test]
fn no_file_names_a_path_or_a_package_host_of_the_machine_it_was_written_on() {
    let paths = ["work", "root"].map(|dir| format!("/{dir}/"));
    let hosts = private_hosts();
    let mut found = Vec::new();
    for file in tracked_files() {
        let Some(text) = text_of(&file) else { continue };
        for (number, line) in text.lines().enumerate() {
            let names_path = paths.iter().any(|path| {
                line.match_indices(path).any(|(at, _)| {
                    // `model/root/x` and `${DIR}/work/` are not at the root of a machine.
                    !line[..at]
                        .ends_with(|before: char| before.is_alphanumeric() || "._-}*~".contains(before))
                })
            });
            if names_path || hosts.iter().any(|host| line.contains(host.as_str())) {
                found.push(format!("{}:{}", file.display(), number + 1));
            }
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn every_locked_package_comes_from_the_public_registry() {
    let lock = text_of(Path::new("Cargo.lock")).unwrap();
    let elsewhere: Vec<&str> = lock
        .lines()
        .filter_map(|line| line.strip_prefix("source = "))
        .filter(|source| *source != "\"registry+https://github.com/rust-lang/crates.io-index\"")
        .collect();
    assert!(elsewhere.is_empty(), "{elsewhere:?}");
}
