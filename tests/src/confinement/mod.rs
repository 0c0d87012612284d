//! What the agent of a node may write and what it may not, as requests to any control plane that has the chart.
//!
//! Owns: the cells of that matrix and how a request ended. Must not: start anything, or know how a client got its token.

mod attempt;
pub mod matrix;

pub use attempt::{Attempt, Outcome, Verb};

use kube::Client;
use serde_json::{Value, json};

/// Makes with `admin` what the attempts of the matrix are made on besides each node's own objects.
pub async fn furnish(admin: &Client) -> anyhow::Result<()> {
    for name in ["input-of-a-job", "result-of-nobody"] {
        make(admin, &matrix::config_maps(), json!({"metadata": {"name": name}})).await?;
    }
    Ok(())
}

/// Makes an object for good.
pub async fn make(client: &Client, path: &str, body: Value) -> anyhow::Result<()> {
    let attempt = Attempt::with(Verb::Create, path, body).for_good();
    let done = attempt.answer(client).await;
    done.map_err(|error| anyhow::anyhow!("{attempt}: {error}"))?;
    Ok(())
}

/// Runs every attempt and names those that did not end as `wanted`.
pub async fn surprises(client: &Client, who: &str, attempts: &[Attempt], wanted: &Outcome) -> Vec<String> {
    let mut found = Vec::new();
    for attempt in attempts {
        let outcome = attempt.outcome(client).await;
        if outcome != *wanted {
            found.push(format!("{who}: {attempt}: wanted {wanted:?}, got {outcome:?}"));
        }
    }
    found
}
