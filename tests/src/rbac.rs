//! Every right that the chart gives GoGrid's accounts, with the code that uses it and the test that needs it.
//!
//! Owns: that table, its page, and its comparison with what is rendered. Must not: grant anything; the templates do.

mod table;

pub use table::GRANTS;

use anyhow::{Context as _, Result, ensure};
use gogrid_reference::heading;
use serde_json::Value;
use std::collections::BTreeSet;

/// Where a right holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// In every namespace, or on what belongs to none.
    Everywhere,
    /// In GoGrid's own namespace.
    Own,
    /// In `kube-system`, on the leader Lease.
    Leader,
}

/// One verb on one resource for one account.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Right {
    /// `operator`, `agent` or `trial`.
    pub account: String,
    /// Where it holds.
    pub place: Place,
    /// API group; empty for the core group.
    pub group: String,
    /// Plural name, with the subresource after a slash.
    pub resource: String,
    /// The verb.
    pub verb: String,
}

/// Rights that one piece of code uses for one purpose.
pub struct Grant {
    account: &'static str,
    place: Place,
    group: &'static str,
    resource: &'static str,
    verbs: &'static [&'static str],
    /// File and function.
    code: (&'static str, &'static str),
    /// File and function.
    test: (&'static str, &'static str),
    why: &'static str,
}

impl Grant {
    fn rights(&self) -> impl Iterator<Item = Right> + '_ {
        self.verbs.iter().map(|verb| Right {
            account: self.account.into(),
            place: self.place,
            group: self.group.into(),
            resource: self.resource.into(),
            verb: (*verb).into(),
        })
    }

    /// File and function of the code and of the test.
    pub fn places(&self) -> [(&'static str, &'static str); 2] {
        [self.code, self.test]
    }
}

/// The rights of the table.
pub fn listed() -> BTreeSet<Right> {
    GRANTS.iter().flat_map(Grant::rights).collect()
}

/// Those that the recorded run uses each time.
pub fn used_by_the_run() -> BTreeSet<Right> {
    let used = GRANTS.iter().filter(|grant| grant.test == table::USED);
    used.flat_map(Grant::rights).collect()
}

/// The page about them.
pub fn page() -> String {
    let mut page = heading("Rights of GoGrid's accounts", "tests/src/rbac.rs");
    page += "Every right that the chart grants is in this table, and nothing else is granted. The recorded run of the operator and\n\
             its agents in `tests/tests/observed` uses every right whose test it is, and is refused nothing. The others are\n\
             used where an answer was lost, and by `helm test`, whose account is `trial`. All agents share one account; an\n\
             admission policy confines each to its own node.\n\n\
             | account | where | resource | verbs | what for | code | test |\n| --- | --- | --- | --- | --- | --- | --- |\n";
    for grant in GRANTS {
        let place = match grant.place {
            Place::Everywhere => "everywhere",
            Place::Own => "GoGrid's namespace",
            Place::Leader => "`kube-system`",
        };
        let resource = if grant.group.is_empty() {
            grant.resource.to_owned()
        } else {
            format!("{}.{}", grant.resource, grant.group)
        };
        page += &format!(
            "| {} | {place} | `{resource}` | {} | {} | `{}`: `{}` | `{}`: `{}` |\n",
            grant.account,
            grant.verbs.join(", "),
            grant.why,
            grant.code.0,
            grant.code.1,
            grant.test.0,
            grant.test.1,
        );
    }
    page
}

/// The rights in rendered roles that are bound to accounts.
pub fn granted(documents: &[Value], namespace: &str) -> Result<BTreeSet<Right>> {
    let mut found = BTreeSet::new();
    let bindings = documents
        .iter()
        .filter(|o| o["kind"] == "RoleBinding" || o["kind"] == "ClusterRoleBinding");
    for binding in bindings {
        let subject = binding["subjects"][0]["name"].as_str().context("a subject")?;
        let account = subject.rsplit('-').next().unwrap_or_default().to_owned();
        let place = match binding["metadata"]["namespace"].as_str() {
            None => Place::Everywhere,
            Some("kube-system") => Place::Leader,
            Some(own) => {
                ensure!(own == namespace, "a role in {own}");
                Place::Own
            }
        };
        let role = documents
            .iter()
            .find(|o| {
                o["kind"] == binding["roleRef"]["kind"]
                    && o["metadata"]["name"] == binding["roleRef"]["name"]
                    && o["metadata"]["namespace"] == binding["metadata"]["namespace"]
            })
            .context("a binding without a role")?;
        for rule in role["rules"].as_array().into_iter().flatten() {
            for (group, resource, verb) in triples(rule) {
                found.insert(Right {
                    account: account.clone(),
                    place,
                    group,
                    resource,
                    verb,
                });
            }
        }
    }
    Ok(found)
}

fn triples(rule: &Value) -> Vec<(String, String, String)> {
    let words = |key: &str| -> Vec<String> {
        rule[key]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|word| word.as_str().map(str::to_owned))
            .collect()
    };
    let (resources, verbs) = (words("resources"), words("verbs"));
    let mut found = Vec::new();
    for group in words("apiGroups") {
        for resource in &resources {
            for verb in &verbs {
                found.push((group.clone(), resource.clone(), verb.clone()));
            }
        }
    }
    found
}
