//! Every right that the chart gives GoGrid's accounts, with the code that uses it and the test that needs it.
//!
//! Owns: that table, its page, and its comparison with what is rendered. Must not: grant anything; the templates do.

mod table;

pub use table::{GRANTS, HELM_TEST, OBSERVED};

use crate::controlplane::AuditEvent;
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

/// What was seen of rights in a run, if it used all that name it as their test and was refused nothing.
///
/// # Errors
/// The rights that nothing used, or the requests that were refused.
pub fn check(requests: &[AuditEvent], namespace: &str, (_, test): (&str, &str)) -> Result<String> {
    let (used, refused) = used(requests, namespace);
    ensure!(refused.is_empty(), "refused: {refused:#?}");
    let needed: BTreeSet<Right> = GRANTS
        .iter()
        .filter(|grant| grant.test.1 == test)
        .flat_map(Grant::rights)
        .collect();
    let idle: Vec<&Right> = needed.difference(&used).collect();
    ensure!(idle.is_empty(), "granted and not used: {idle:#?}");
    Ok(format!(
        "{} requests, none of GoGrid's accounts' refused; {} of {} rights used",
        requests.len(),
        listed().intersection(&used).count(),
        listed().len()
    ))
}

/// The rights of GoGrid's accounts that these requests used, and the requests that were refused.
fn used<'e>(requests: &'e [AuditEvent], namespace: &str) -> (BTreeSet<Right>, Vec<&'e AuditEvent>) {
    let prefix = format!("system:serviceaccount:{namespace}:gogrid-");
    let (mut used, mut refused) = (BTreeSet::new(), vec![]);
    for request in requests {
        let Some(account) = request.user.strip_prefix(&prefix) else {
            continue;
        };
        if request.code == 403 {
            refused.push(request);
        }
        let resource = match request.subresource.as_str() {
            "" => request.resource.clone(),
            sub => format!("{}/{sub}", request.resource),
        };
        let mut verbs = vec![request.verb.clone()];
        // Applying what is not there is authorised as a creation too.
        if request.verb == "patch" && request.code == 201 {
            verbs.push("create".into());
        }
        let places: &[Place] = match request.namespace.as_str() {
            "kube-system" => &[Place::Leader, Place::Everywhere],
            own if own == namespace => &[Place::Own, Place::Everywhere],
            _ => &[Place::Everywhere],
        };
        for verb in verbs {
            used.extend(places.iter().map(|place| Right {
                account: account.to_owned(),
                place: *place,
                group: request.group.clone(),
                resource: resource.clone(),
                verb: verb.clone(),
            }));
        }
    }
    (used, refused)
}

/// The page about them.
pub fn page() -> String {
    let mut page = heading("Rights of GoGrid's accounts", "tests/src/rbac.rs");
    page += "Every right that the chart grants is in this table, and nothing else is granted. The recorded run of the operator and\n\
             its agents in `tests/tests/observed` and the `helm test` on real nodes, whose account is `trial`, together use\n\
             every one of them and are refused nothing. All agents share one account; an admission policy confines each to\n\
             its own node.\n\n\
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
