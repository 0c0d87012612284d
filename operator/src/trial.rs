//! `gogrid-operator trial`: what `helm test` runs, with a service account of its own.
//!
//! Owns: telling what is wrong per node, and one real job from its creation to its checked answer. Must not: use any right
//! that a user with the role `edit` in the namespace lacks, but for reading nodes.

mod report;

use clap::Args;
use gogrid_api::names::RESULTS_KEY;
use gogrid_api::{Condition, ConditionStatus, GpuNode, InferenceJob, condition};
use k8s_openapi::api::core::v1::{ConfigMap, Event, Node, Pod};
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use report::Found;
use serde_json::{Value, json};
use std::time::Duration;

/// Name of the trial's job and of its result.
const NAME: &str = "gogrid-trial";
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The trial's settings.
#[derive(Debug, Args)]
pub(crate) struct Trial {
    /// Namespace in which the job runs.
    #[arg(long, env = "POD_NAMESPACE", default_value = "gogrid-system")]
    namespace: String,
    /// The model.
    #[arg(long)]
    model_uri: String,
    /// What its bytes must hash to.
    #[arg(long)]
    model_sha256: String,
    /// The one prompt.
    #[arg(long)]
    prompt: String,
    /// The right answer.
    #[arg(long)]
    answer: String,
    /// Seconds until it must be there.
    #[arg(long, default_value_t = 100)]
    within_seconds: u64,
}

/// How the trial failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrialError {
    /// The API server.
    #[error("{doing}: {source}")]
    Api {
        /// What was being done.
        doing: &'static str,
        /// What went wrong.
        source: Box<kube::Error>,
    },
    /// A job that can't be written down.
    #[error("the trial's job: {0}")]
    Job(#[from] serde_json::Error),
    /// It ended otherwise.
    #[error("the job failed: {0}")]
    Failed(String),
    /// Another answer.
    #[error("the model answered {found:?}, right is {wanted:?}")]
    Wrong {
        /// The answer.
        found: String,
        /// The right one.
        wanted: String,
    },
    /// No end.
    #[error("no answer within {seconds} s; {last}")]
    Late {
        /// The limit.
        seconds: u64,
        /// The job's last word.
        last: String,
    },
}

fn api(doing: &'static str) -> impl Fn(kube::Error) -> TrialError {
    move |error| TrialError::Api {
        doing,
        source: Box::new(error),
    }
}

impl Trial {
    /// Prints what there is and what is wrong with it, runs the job, checks its answer and removes both.
    pub(crate) async fn run(&self, client: Client) -> Result<(), TrialError> {
        print!("{}", self.look(&client).await?.report());
        let jobs = Api::<InferenceJob>::namespaced(client.clone(), &self.namespace);
        let results = Api::<ConfigMap>::namespaced(client, &self.namespace);
        // Of a trial that was cut off.
        remove(&jobs, &results).await?;
        let mut last = "it was never looked at".to_owned();
        let limit = Duration::from_secs(self.within_seconds);
        let outcome = tokio::time::timeout(limit, self.follow(&jobs, &results, &mut last)).await;
        remove(&jobs, &results).await?;
        outcome.unwrap_or(Err(TrialError::Late {
            seconds: self.within_seconds,
            last,
        }))
    }

    async fn look(&self, client: &Client) -> Result<Found, TrialError> {
        let nodes = Api::<Node>::all(client.clone());
        let gpu_nodes = Api::<GpuNode>::all(client.clone());
        let pods = Api::<Pod>::namespaced(client.clone(), &self.namespace);
        let events = Api::<Event>::namespaced(client.clone(), &self.namespace);
        let all = ListParams::default();
        let ours = all
            .clone()
            .labels("app.kubernetes.io/component in (operator, agent)");
        let warnings = all.clone().fields("type=Warning");
        Ok(Found {
            nodes: nodes.list(&all).await.map_err(api("listing nodes"))?.items,
            gpu_nodes: gpu_nodes.list(&all).await.map_err(api("listing gpunodes"))?.items,
            pods: pods.list(&ours).await.map_err(api("listing pods"))?.items,
            warnings: events.list(&warnings).await.map_err(api("listing events"))?.items,
        })
    }

    fn job(&self) -> Result<InferenceJob, serde_json::Error> {
        let record = json!({
            "custom_id": "trial", "method": "POST", "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": self.prompt}], "max_tokens": 32},
        });
        serde_json::from_value(json!({
            "apiVersion": "gogrid.dev/v1alpha1", "kind": "InferenceJob",
            "metadata": {"name": NAME, "namespace": self.namespace},
            "spec": {
                "model": {"uri": self.model_uri, "sha256": self.model_sha256},
                "input": {"inline": [record.to_string()]}, "output": {"configMap": NAME},
                "contextTokens": 128, "parallelSequences": 1,
            },
        }))
    }

    async fn follow(
        &self,
        jobs: &Api<InferenceJob>,
        results: &Api<ConfigMap>,
        last: &mut String,
    ) -> Result<(), TrialError> {
        // Its deletion lasts until all that was made for it is gone.
        while jobs
            .get_opt(NAME)
            .await
            .map_err(api("looking for a former job"))?
            .is_some()
        {
            "the job of a former trial is still being deleted".clone_into(last);
            tokio::time::sleep(LOOK_EVERY).await;
        }
        let made = jobs.create(&PostParams::default(), &self.job()?).await;
        made.map_err(api("creating the job"))?;
        loop {
            let job = jobs.get(NAME).await.map_err(api("reading the job"))?;
            let conditions = job.status.map(|s| s.conditions).unwrap_or_default();
            let now = summary(&conditions);
            if now != *last {
                println!("{now}");
                last.clone_from(&now);
            }
            if condition::is_true(&conditions, "Finished") {
                if !condition::is_true(&conditions, "Succeeded") {
                    return Err(TrialError::Failed(now));
                }
                let map = results.get(NAME).await.map_err(api("reading the result"))?;
                let found = answer(
                    &map.data
                        .unwrap_or_default()
                        .remove(RESULTS_KEY)
                        .unwrap_or_default(),
                );
                println!("{} -> {found}", self.prompt);
                return if found == self.answer {
                    Ok(())
                } else {
                    Err(TrialError::Wrong {
                        found,
                        wanted: self.answer.clone(),
                    })
                };
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

async fn remove(jobs: &Api<InferenceJob>, results: &Api<ConfigMap>) -> Result<(), TrialError> {
    let absent_is_fine = |result: Result<(), kube::Error>| match result {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => other,
    };
    let foreground = DeleteParams::foreground();
    absent_is_fine(jobs.delete(NAME, &foreground).await.map(drop)).map_err(api("deleting the job"))?;
    let gone = results.delete(NAME, &DeleteParams::default()).await;
    absent_is_fine(gone.map(drop)).map_err(api("deleting the result"))
}

/// The job's summary on one line, and why it waits if it does.
fn summary(conditions: &[Condition]) -> String {
    let says = |type_: &str| condition::find(conditions, type_);
    let of = |c: &Condition| format!("{}: {}", c.reason, c.message);
    match (says("Succeeded"), says("Placed")) {
        (_, Some(placed)) if placed.status != ConditionStatus::True && !placed.message.is_empty() => {
            of(placed)
        }
        (Some(succeeded), _) => of(succeeded),
        (None, _) => "the operator has not looked at the job yet".to_owned(),
    }
}

/// The text of the first record's answer.
fn answer(results: &str) -> String {
    let first: Value = results
        .lines()
        .next()
        .and_then(|line| serde_json::from_str(line).ok())
        .unwrap_or_default();
    let text = first.pointer("/response/body/choices/0/message/content");
    text.and_then(Value::as_str).unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_the_text_of_the_first_record() {
        let line =
            json!({"response": {"body": {"choices": [{"message": {"content": " 46\n"}}]}}}).to_string();
        assert_eq!(answer(&format!("{line}\n")), "46");
        assert_eq!(answer("no json"), "");
    }
}
