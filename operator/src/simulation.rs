//! Whole lives of jobs without an API server: rounds on one side, a scripted agent on the other.
//!
//! Owns: a stand-in for the executor that keeps the store's own rules. Tests only.

use crate::apply::{Fact, Op};
use crate::config::{Config, Layers, LogFormat, Pod};
use crate::observe::{Change, LeaseInfo, NodeInfo, Observation};
use crate::round::{Memory, Round, Work};
use crate::store::Store;
use gogrid_api::assignment::{StagedInput, State};
use gogrid_api::job::ResultStatus;
use gogrid_api::{Assignment, GpuNode, InferenceJob, LeaseTiming, Millis, condition};
use gogrid_planner::lifecycle::Publication;
use gogrid_planner::liveness::Liveness;
use kube::ResourceExt as _;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

mod former_runs;
mod short_inputs;

struct Sim {
    store: Store,
    memory: BTreeMap<String, Memory>,
    has_inputs: BTreeSet<String>,
    missing_since: BTreeMap<String, Millis>,
    config: Config,
    now: u64,
    version: u64,
    writes: u32,
    steps: Vec<String>,
    /// What staging a job's input comes to.
    input: StagedInput,
    /// Leases that had to be silent.
    silent: Vec<String>,
}

const WALL: i64 = 1_700_000_000;
const START: u64 = 1_000_000;

impl Sim {
    fn new() -> Self {
        let config = Config {
            namespace: "gogrid-system".into(),
            timing: LeaseTiming::default(),
            metrics_addr: ([127, 0, 0, 1], 0).into(),
            model_roots: vec!["/models".into()],
            version: "1.5.0".into(),
            release: "gogrid-system".into(),
            holder: "me".into(),
            pod: Pod::default(),
            log_format: LogFormat::Text,
            concurrency: 8,
            layers: Layers::default(),
            #[cfg(feature = "faults")]
            faults: vec![],
        };
        let mut sim = Self {
            store: Store::new(Liveness::new(config.timing, Millis(START))),
            memory: BTreeMap::new(),
            has_inputs: BTreeSet::new(),
            missing_since: BTreeMap::new(),
            config,
            now: START,
            version: 100,
            writes: 0,
            steps: vec![],
            input: short_inputs::beside_the_order(),
            silent: vec![],
        };
        let none = || vec![];
        for list in [
            Observation::Job(Change::Listed(vec![])),
            Observation::Assignment(Change::Listed(vec![])),
            Observation::Profile(Change::Listed(vec![])),
            Observation::Lease(Change::Listed(none())),
            Observation::Priority(Change::Listed(vec![])),
            Observation::Node(Change::Listed(vec![])),
            Observation::GpuNode(Change::Listed(vec![])),
        ] {
            sim.store.apply(Millis(sim.now), list);
        }
        sim
    }

    fn node(&mut self, name: &str, session: &str) {
        let info = NodeInfo {
            name: name.into(),
            labels: BTreeMap::new(),
            taints: vec![],
            unschedulable: false,
            drained: false,
        };
        self.see(Observation::Node(Change::Changed(Box::new(info))));
        let facts = json!({
            "architecture": "llama", "name": "tiny", "quantization": "Q8_0", "fileBytes": 1_100_000, "weightBytes": 1_000_000,
            "parameters": 1_000_000, "layers": 4, "embedding": 64, "feedForward": 128, "vocabulary": 512, "contextLength": 4096,
            "kvBytesPerToken": 1024,
        });
        let gpu_node: GpuNode = serde_json::from_value(json!({
            "apiVersion": "gogrid.dev/v1alpha1", "kind": "GpuNode", "metadata": {"name": name, "uid": name}, "spec": {"nodeName": name},
            "status": {
                "session": session, "agentVersion": "1.5.0",
                "devices": [{"uuid": "cpu", "name": "CPU", "backend": "CPU", "memoryTotal": "8Gi", "memoryReserved": "0",
                    "memoryForeign": "0", "memoryFree": "8Gi", "health": "Healthy"}],
                "models": [{"uri": "file:/models/a.gguf", "bytes": 1_100_000, "facts": facts}],
            },
        }))
        .unwrap();
        self.see(Observation::GpuNode(Change::Changed(Box::new(gpu_node))));
        self.beat(name, session);
    }

    fn beat(&mut self, name: &str, session: &str) {
        self.version += 1;
        let lease = LeaseInfo {
            name: format!("node-{name}"),
            holder: Some(session.into()),
            mark: self.version.to_string(),
        };
        self.see(Observation::Lease(Change::Changed(Box::new(lease))));
    }

    fn see(&mut self, observation: Observation) {
        self.store.apply(Millis(self.now), observation);
    }

    fn job(&mut self, patch: &Value) {
        self.version += 1;
        let mut spec = json!({
            "model": {"uri": "file:/models/a.gguf", "sha256": "0".repeat(64)}, "input": {"inline": ["{}", "{}"]}, "output": {"configMap": "o"},
        });
        for (key, value) in patch.as_object().unwrap() {
            spec[key] = value.clone();
        }
        let old = self.store.jobs.get("u").and_then(|j| j.status.clone());
        let job: InferenceJob = serde_json::from_value(json!({
            "apiVersion": "gogrid.dev/v1alpha1", "kind": "InferenceJob",
            "metadata": {"name": "j", "namespace": "n", "uid": "u", "resourceVersion": self.version.to_string(), "generation": 1},
            "spec": spec, "status": old,
        }))
        .unwrap();
        self.see(Observation::Job(Change::Changed(Box::new(job))));
    }

    fn agent(&mut self, name: &str, status: &Value) {
        let mut assignment = self.store.assignments.get(name).unwrap().clone();
        self.version += 1;
        assignment.metadata.resource_version = Some(self.version.to_string());
        assignment.status = serde_json::from_value(status.clone()).unwrap();
        self.see(Observation::Assignment(Change::Changed(Box::new(assignment))));
    }

    /// Rounds until there is nothing more to do.
    fn settle(&mut self) {
        for _ in 0..20 {
            let missing = Round::missing(&self.store, &self.has_inputs);
            self.missing_since.retain(|uid, _| missing.contains(uid));
            for uid in missing {
                self.missing_since.entry(uid).or_insert(Millis(self.now));
            }
            let works = Round {
                store: &self.store,
                memory: &self.memory,
                busy: &BTreeMap::new(),
                has_inputs: &self.has_inputs,
                missing_since: &self.missing_since,
                config: &self.config,
                now: Millis(self.now),
                wall: WALL + i64::try_from(self.now / 1000).unwrap(),
                term: 1,
            }
            .works();
            if works.is_empty() {
                return;
            }
            for work in works {
                self.work(work);
            }
        }
        panic!("the rounds never end: {:?}", self.steps);
    }

    fn work(&mut self, work: Work) {
        self.steps.push(work.step.into());
        for op in work.ops {
            self.version += 1;
            let version = Some(self.version.to_string());
            let memory = self.memory.entry(work.uid.clone()).or_default();
            match op {
                Op::EnsureAbsent(name) => assert!(!self.store.assignments.contains_key(&name)),
                Op::WriteStatus(status) => {
                    self.writes += 1;
                    let mut job = self.store.jobs.get(&work.uid).unwrap().clone();
                    let old = job.status.clone().unwrap_or_default();
                    assert!(
                        status.epoch == old.epoch + 1
                            || (status.epoch == old.epoch && status.placement == old.placement),
                        "the fence rule"
                    );
                    job.status = Some(*status);
                    job.metadata.resource_version = version;
                    memory.written = Some(Millis(self.now));
                    self.store.put_job(job);
                }
                Op::EnsureSilent { lease, mark } => {
                    assert_eq!(self.store.leases.get(&lease).map(|l| l.mark.clone()), mark);
                    self.silent.push(lease);
                }
                Op::Stage => {
                    if self.input.config_map.is_some() {
                        self.has_inputs.insert(work.uid.clone());
                    }
                    memory.staged = Some(vec![self.input.clone()]);
                }
                Op::Create(a) | Op::CreateIfStill(a) => {
                    let mut a = *a;
                    a.metadata.uid = Some(format!("uid-{}", a.name_any()));
                    a.metadata.resource_version = version;
                    assert!(!self.store.assignments.contains_key(&a.name_any()));
                    memory.learn(
                        Millis(self.now),
                        work.step,
                        &Fact::Assignment(Box::new(a.clone())),
                    );
                    self.store.put_assignment(a);
                }
                Op::Stop(a, stop) => {
                    let mut a = *a;
                    assert_eq!(a.spec.stop, None);
                    a.spec.stop = Some(stop);
                    a.metadata.resource_version = version;
                    self.store.put_assignment(a);
                }
                Op::Publish(_, records) => {
                    memory.published = Some(Publication::Done(ResultStatus {
                        location: "configmap/o".into(),
                        sha256: "0".repeat(64),
                        bytes: 10,
                        records,
                        failed_records: 0,
                        preview: String::new(),
                    }));
                }
                Op::DeleteAssignment(a) => self.store.drop_assignment(&a.name_any(), &a.uid().unwrap()),
                Op::DeleteInputs(uid) => drop(self.has_inputs.remove(&uid)),
                Op::DeleteJob => self.store.drop_job("u"),
            }
        }
    }

    fn reason(&self) -> String {
        let status = self.store.jobs.get("u").and_then(|j| j.status.clone()).unwrap();
        condition::find(&status.conditions, "Succeeded")
            .unwrap()
            .reason
            .clone()
    }

    fn is(&self, type_: &str) -> bool {
        let status = self.store.jobs.get("u").and_then(|j| j.status.clone()).unwrap();
        condition::is_true(&status.conditions, type_)
    }

    fn run(&self, name: &str) -> &Assignment {
        self.store.assignments.get(name).unwrap()
    }

    fn pass(&mut self, seconds: u64, beating: &[(&str, &str)]) {
        for _ in 0..seconds {
            self.now += 1000;
            self.store.liveness.tick(Millis(self.now));
            for (name, session) in beating {
                self.beat(name, session);
            }
        }
    }
}

#[test]
fn a_job_lives_within_eight_writes_and_leaves_nothing_behind() {
    let mut sim = Sim::new();
    sim.job(&json!({}));
    sim.settle();
    assert_eq!(sim.reason(), "NoNodes");
    sim.node("a", "s1");
    sim.settle();
    assert!(sim.is("Placed"));
    assert_eq!(sim.run("u-1").spec.session, "s1");
    for state in ["Claimed", "Fetching", "Loading", "Running"] {
        sim.agent("u-1", &json!({"state": state}));
        sim.settle();
    }
    assert!(sim.is("Loaded") && sim.is("ModelVerified") && sim.is("LeaseHeld"));
    let before = sim.writes;
    sim.settle();
    assert_eq!(sim.writes, before, "nothing changed, nothing is written");
    sim.agent("u-1", &json!({"state": "Succeeded", "checkpoint": {"chunks": 1}}));
    sim.settle();
    assert!(sim.is("Succeeded") && sim.is("Finished"));
    assert!(sim.store.assignments.is_empty() && sim.has_inputs.is_empty());
    assert!(sim.writes <= 8, "{} writes: {:?}", sim.writes, sim.steps);
    let status = sim.store.jobs.get("u").unwrap().status.clone().unwrap();
    assert_eq!(status.result.unwrap().records, 2);
}

#[test]
fn a_lost_node_costs_an_epoch_and_answered_lines_are_left_out_there() {
    let mut sim = Sim::new();
    sim.node("a", "s1");
    sim.job(&json!({"failurePolicy": {"maxFailedRecords": 5}}));
    sim.settle();
    sim.agent("u-1", &json!({"state": "Running", "checkpoint": {"chunks": 1, "lines": [{"first": 1, "last": 1}], "failed": 1}}));
    sim.settle();
    sim.node("b", "t1");
    sim.pass(46, &[("b", "t1")]);
    sim.settle();
    let second = sim.run("u-2");
    assert_eq!(
        (second.spec.node_name.as_str(), second.spec.max_failed_records),
        ("b", Some(4))
    );
    assert_eq!(second.spec.skip.len(), 1);
    assert!(sim.run("u-1").spec.stop.is_some(), "the zombie is told to stop");
    assert_eq!(
        sim.silent,
        ["node-a"],
        "asked of the store before the epoch was raised"
    );
    let status = sim.store.jobs.get("u").unwrap().status.clone().unwrap();
    assert_eq!((status.epoch, status.attempts), (2, 0));
    sim.agent("u-2", &json!({"state": "Succeeded", "checkpoint": {"chunks": 1}}));
    sim.settle();
    assert!(sim.is("Succeeded"));
    assert!(sim.store.assignments.is_empty());
}

#[test]
fn suspend_waits_for_the_agent_shows_what_was_done_and_resume_counts_a_new_epoch() {
    let mut sim = Sim::new();
    sim.node("a", "s1");
    sim.job(&json!({}));
    sim.settle();
    sim.agent("u-1", &json!({"state": "Running"}));
    sim.job(&json!({"suspend": true}));
    sim.settle();
    assert!(!sim.is("Suspended") && sim.run("u-1").spec.stop.is_some());
    sim.agent(
        "u-1",
        &json!({
            "state": "Stopped", "checkpoint": {"chunks": 1, "lines": [{"first": 2, "last": 2}]},
            "progress": {"done": 1, "failed": 0, "total": 2, "tokens": 3, "tokensPerSecond": "", "display": "1/2"},
        }),
    );
    sim.settle();
    assert!(sim.is("Suspended") && !sim.is("Placed"));
    let shown = sim.store.jobs.get("u").unwrap().status.clone().unwrap().progress;
    assert_eq!(shown.unwrap().display, "1/2", "what it did last is shown");
    sim.pass(10, &[("a", "s1")]);
    sim.job(&json!({}));
    sim.settle();
    assert_eq!(sim.run("u-2").spec.skip.len(), 1);
    let status = sim.store.jobs.get("u").unwrap().status.clone().unwrap();
    assert_eq!((status.epoch, status.suspended_seconds), (2, 10));
}

#[test]
fn a_deleted_job_has_its_run_stopped_and_then_everything_removed() {
    let mut sim = Sim::new();
    sim.node("a", "s1");
    sim.job(&json!({}));
    sim.settle();
    sim.agent("u-1", &json!({"state": "Running"}));
    sim.settle();
    sim.store.drop_job("u");
    sim.settle();
    assert!(sim.run("u-1").spec.stop.is_some());
    sim.agent("u-1", &json!({"state": "Stopped"}));
    sim.settle();
    assert!(sim.store.assignments.is_empty());
    sim.pass(10, &[("a", "s1")]);
    sim.settle();
    assert!(sim.has_inputs.is_empty());
}

#[test]
fn a_crash_between_placing_and_ordering_is_made_good_under_the_same_epoch() {
    let mut sim = Sim::new();
    sim.node("a", "s1");
    sim.job(&json!({}));
    sim.settle();
    let order = sim.run("u-1").spec.clone();
    sim.store.drop_assignment("u-1", "uid-u-1");
    sim.memory.clear();
    sim.version += 1;
    // The dead order's uid is remembered as gone; a new one gets another uid on a real server.
    let works = sim.steps.len();
    let round = Round {
        store: &sim.store,
        memory: &sim.memory,
        busy: &BTreeMap::new(),
        has_inputs: &sim.has_inputs,
        missing_since: &sim.missing_since,
        config: &sim.config,
        now: Millis(sim.now),
        wall: WALL,
        term: 1,
    };
    let first = round.works();
    assert!(
        matches!(first[0].ops[..], [Op::Stage]),
        "inputs are staged again first"
    );
    sim.memory.entry("u".into()).or_default().staged = Some(order.inputs.clone());
    let round = Round {
        memory: &sim.memory,
        store: &sim.store,
        busy: &BTreeMap::new(),
        has_inputs: &sim.has_inputs,
        missing_since: &sim.missing_since,
        config: &sim.config,
        now: Millis(sim.now),
        wall: WALL,
        term: 1,
    };
    let second = round.works();
    let [Op::CreateIfStill(again)] = &second[0].ops[..] else {
        panic!("{:?}", second[0].ops)
    };
    assert_eq!(again.spec, order);
    assert_eq!(sim.steps.len(), works);
}

#[test]
fn an_order_that_this_process_has_not_seen_is_looked_up_before_it_is_called_lost() {
    let mut sim = Sim::new();
    sim.node("a", "s1");
    sim.job(&json!({}));
    sim.settle();
    sim.agent("u-1", &json!({"state": "Running"}));
    sim.settle();
    assert!(
        sim.store
            .jobs
            .get("u")
            .unwrap()
            .status
            .clone()
            .unwrap()
            .lease
            .is_some()
    );
    // A new leader whose watch lags behind the jobs that it reads.
    sim.see(Observation::Assignment(Change::Listed(vec![])));
    let round = Round {
        store: &sim.store,
        memory: &sim.memory,
        busy: &BTreeMap::new(),
        has_inputs: &sim.has_inputs,
        missing_since: &sim.missing_since,
        config: &sim.config,
        now: Millis(sim.now),
        wall: WALL,
        term: 1,
    };
    let works = round.works();
    let [Op::EnsureAbsent(name), Op::WriteStatus(_)] = &works[0].ops[..] else {
        panic!("{:?}", works[0].ops)
    };
    assert_eq!(name, "u-1");
}

#[test]
fn an_unknown_model_is_inspected_once_for_all_jobs_and_its_failure_is_the_reason() {
    let mut sim = Sim::new();
    sim.node("a", "s1");
    sim.job(&json!({"model": {"uri": "https://h/b.gguf", "sha256": "1".repeat(64)}}));
    sim.settle();
    assert_eq!(sim.reason(), "InspectingModel");
    assert_eq!(sim.store.assignments.keys().collect::<Vec<_>>(), ["u-inspect-0"]);
    sim.agent("u-inspect-0", &json!({"state": State::Failed, "failure": {"reason": "DownloadRefused", "message": "no", "retryable": false}}));
    sim.settle();
    assert_eq!(sim.reason(), "DownloadRefused");
    assert_eq!(sim.store.assignments.len(), 1);
}
