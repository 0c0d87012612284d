//! Golden scenarios: a cluster and jobs as text, the explained plan as text. `UPDATE=1` rewrites the plans.
//!
//! Each file in `scenarios/` holds the input, a line `---`, and the plan. Lines of the input:
//! `profile NAME vram=PERCENT [reserve=BYTES] [batch=N] [node=LABEL=VALUE] [weighted]`
//! `node NAME [label=K=V] [taint=K=V:EFFECT] [cordoned] [silent|lost] [unready]`
//! `device UUID CPU|CUDA total=BYTES [reserved=BYTES] [foreign=BYTES] [used=BYTES] [unhealthy] [held=POD]` (of the node above)
//! `model URI` (of the node above)
//! `job NAME need=BYTES [uri=URI] [cpu=Never] [label=K=V] [bears=KEY] [profile=NAME] [priority=N] [created=N] [prefer=NODE]`

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use gogrid_api::effective::NamedProfile;
use gogrid_api::job::{CpuFallback, Split, TaintEffect, Toleration, TolerationOperator};
use gogrid_api::node::Backend;
use gogrid_api::{ByteQuantity, Bytes, profile};
use gogrid_planner::check::check;
use gogrid_planner::queue::{self, Waiting};
use gogrid_planner::{Decision, Demand, Device, Heartbeat, JobRequest, Node, Taint, World, plan};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

fn bytes(text: &str) -> Bytes {
    ByteQuantity(text.into()).bytes().unwrap()
}

fn parse_profile(name: &str, words: &[&str]) -> NamedProfile {
    let [_, (_, mut spec), _] = profile::presets();
    spec.node_selector = None;
    for word in words {
        match word.split_once('=') {
            Some(("vram", v)) => spec.vram.max_percent = v.parse().unwrap(),
            Some(("reserve", v)) => spec.vram.reserve = Some(ByteQuantity(v.into())),
            Some(("batch", v)) => spec.max_batch_size = v.parse().unwrap(),
            Some(("node", v)) => {
                spec.node_selector = Some(
                    v.split_once('=')
                        .map(|(k, v)| (k.into(), v.into()))
                        .into_iter()
                        .collect(),
                );
            }
            None if *word == "everywhere" => spec.node_selector = Some(BTreeMap::new()),
            None if *word == "weighted" => {
                spec.cpu.weight = Some(7);
            }
            _ => panic!("profile {name}: {word}"),
        }
    }
    NamedProfile {
        name: name.into(),
        generation: 1,
        spec,
    }
}

fn parse_node(name: &str, words: &[&str]) -> Node {
    let mut node = Node {
        name: name.into(),
        labels: BTreeMap::new(),
        taints: vec![],
        unschedulable: false,
        heartbeat: Heartbeat::Fresh,
        ready: true,
        skew: None,
        session: format!("boot/{name}"),
        devices: vec![],
        models: BTreeSet::new(),
        models_cut: false,
    };
    for word in words {
        match word.split_once('=') {
            Some(("label", v)) => {
                let (k, v) = v.split_once('=').unwrap();
                node.labels.insert(k.into(), v.into());
            }
            Some(("taint", v)) => {
                let (kv, effect) = v.split_once(':').unwrap();
                let (key, value) = kv.split_once('=').unwrap();
                let effect = match effect {
                    "NoSchedule" => TaintEffect::NoSchedule,
                    "NoExecute" => TaintEffect::NoExecute,
                    _ => TaintEffect::PreferNoSchedule,
                };
                node.taints.push(Taint {
                    key: key.into(),
                    value: value.into(),
                    effect,
                });
            }
            None if *word == "cordoned" => node.unschedulable = true,
            None if *word == "silent" => node.heartbeat = Heartbeat::Waiting,
            None if *word == "lost" => node.heartbeat = Heartbeat::Lost,
            None if *word == "unready" => node.ready = false,
            None if *word == "skewed" => node.skew = Some("versions 3 and 1".into()),
            _ => panic!("node {name}: {word}"),
        }
    }
    node
}

fn parse_device(words: &[&str]) -> Device {
    let backend = if words[1] == "CPU" {
        Backend::Cpu
    } else {
        Backend::Cuda
    };
    let mut device = Device {
        uuid: words[0].into(),
        backend,
        total: Bytes(0),
        reserved: Bytes(0),
        foreign: Bytes(0),
        used: Bytes(0),
        jobs: 0,
        healthy: true,
        holder: None,
    };
    for word in &words[2..] {
        match word.split_once('=') {
            Some(("total", v)) => device.total = bytes(v),
            Some(("reserved", v)) => device.reserved = bytes(v),
            Some(("foreign", v)) => device.foreign = bytes(v),
            Some(("used", v)) => {
                device.used = bytes(v);
                device.jobs = 1;
            }
            Some(("held", v)) => {
                device.healthy = false;
                device.holder = Some(v.into());
            }
            None if *word == "unhealthy" => device.healthy = false,
            _ => panic!("device: {word}"),
        }
    }
    device
}

fn parse_job(name: &str, words: &[&str]) -> (Waiting, JobRequest) {
    let mut waiting = Waiting {
        priority: 0,
        created: 0,
        name: name.into(),
    };
    let mut request = JobRequest {
        name: name.into(),
        demand: Demand::Fixed(Bytes(0)),
        layers: 32,
        model_uri: "https://models/m.gguf".into(),
        model_sha256: None,
        node_selector: BTreeMap::new(),
        tolerations: vec![],
        cpu_fallback: CpuFallback::IfNeeded,
        split: Split::Auto,
        profile_name: None,
        preferred_node: None,
    };
    for word in words {
        match word.split_once('=').unwrap() {
            ("need", v) => request.demand = Demand::Fixed(bytes(v)),
            ("uri", v) => request.model_uri = v.into(),
            ("cpu", "Never") => request.cpu_fallback = CpuFallback::Never,
            ("label", v) => {
                let (k, v) = v.split_once('=').unwrap();
                request.node_selector.insert(k.into(), v.into());
            }
            ("bears", key) => {
                let operator = TolerationOperator::Exists;
                request.tolerations.push(Toleration {
                    key: Some(key.into()),
                    operator,
                    value: None,
                    effect: None,
                });
            }
            ("profile", v) => request.profile_name = Some(v.into()),
            ("priority", v) => waiting.priority = v.parse().unwrap(),
            ("created", v) => waiting.created = v.parse().unwrap(),
            ("prefer", v) => request.preferred_node = Some(v.into()),
            _ => panic!("job {name}: {word}"),
        }
    }
    (waiting, request)
}

fn explain(input: &str) -> String {
    let (mut nodes, mut profiles, mut jobs): (Vec<Node>, Vec<NamedProfile>, Vec<_>) =
        (vec![], vec![], vec![]);
    for line in input
        .lines()
        .filter(|l| !l.trim().is_empty() && !l.starts_with('#'))
    {
        let words: Vec<_> = line.split_whitespace().collect();
        match words[0] {
            "profile" => profiles.push(parse_profile(words[1], &words[2..])),
            "node" => nodes.push(parse_node(words[1], &words[2..])),
            "device" => nodes.last_mut().unwrap().devices.push(parse_device(&words[1..])),
            "model" => drop(nodes.last_mut().unwrap().models.insert(words[1].into())),
            "job" => jobs.push(parse_job(words[1], &words[2..])),
            other => panic!("{other}"),
        }
    }
    let mut world = World::new(nodes, profiles).unwrap();
    let (waiting, requests): (Vec<_>, Vec<_>) = jobs.into_iter().unzip();
    let mut out = String::new();
    for index in queue::order(&waiting) {
        let request = &requests[index];
        let decision = plan(&world, request);
        assert_eq!(check(&world, request, &decision), [], "{}", request.name);
        match decision {
            Decision::Place(planned) => {
                world.take(&planned);
                let stage = &planned.stages[0];
                let profiles = planned.profiles.join(", ");
                writeln!(
                    out,
                    "{}: node {} device {} {} (profiles {profiles}, batch {})",
                    request.name, planned.node, stage.device, stage.bytes, planned.parallel_limit
                )
                .unwrap();
            }
            Decision::Unplaced(unplaced) => {
                writeln!(
                    out,
                    "{}: {}: {}",
                    request.name,
                    unplaced.reason.word(),
                    unplaced.reason.message()
                )
                .unwrap();
                for c in unplaced.candidates {
                    writeln!(
                        out,
                        "  {}: {}, {} free, {} missing",
                        c.node,
                        c.reason.word(),
                        c.free,
                        c.missing
                    )
                    .unwrap();
                }
            }
        }
    }
    out
}

#[test]
fn every_scenario_gives_the_plan_that_is_written_below_it() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scenarios");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|f| f.unwrap().path())
        .collect();
    files.sort();
    assert!(files.len() >= 12, "{} scenarios", files.len());
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let (input, golden) = text.split_once("---\n").unwrap_or((&text, ""));
        let plan = explain(input);
        if update() {
            std::fs::write(&file, format!("{input}---\n{plan}")).unwrap();
        } else {
            assert_eq!(plan, golden, "{}: UPDATE=1 rewrites it", file.display());
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "a test's only switch")]
fn update() -> bool {
    std::env::var("UPDATE").is_ok()
}
