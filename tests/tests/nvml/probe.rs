//! The probe alone: `gogrid-agent probe-nvml`, asked over its pipes as the agent does.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use gogrid_agent_core::driver::{Answer, Ask, Found, Identity, Own, Reading, Throttle, Trouble};
use gogrid_simnvml::{Device, Lost, Part, Process, SCENARIO_VARIABLE, Scenario};
use gogrid_tests::cluster::program;

use super::{library, library_without};

/// PID namespace in which a driver counts; elsewhere the probe must say that it can't read processes.
const INITIAL_PIDS: &str = "pid:[4026531836]";

/// A probe that ends with the test.
struct Probe {
    child: Child,
    input: Option<ChildStdin>,
    output: ChildStdout,
}

impl Probe {
    fn start(library: &Path, scenario: &Path) -> Result<Self> {
        let mut child = Command::new(program("gogrid-agent")?)
            .arg("probe-nvml")
            .arg("--library")
            .arg(library)
            .env(SCENARIO_VARIABLE, scenario)
            // As in a pod, whose environment sets some of the agent's own flags.
            .env("NODE_NAME", "node")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take();
        let output = child.stdout.take().context("no output")?;
        Ok(Self { child, input, output })
    }

    fn send(&mut self, ask: &Ask) -> Result<()> {
        let body = serde_json::to_vec(ask)?;
        let input = self.input.as_mut().context("closed")?;
        input.write_all(&u32::try_from(body.len())?.to_le_bytes())?;
        Ok(input.write_all(&body)?)
    }

    fn ask(&mut self, ask: &Ask) -> Result<Answer> {
        self.send(ask)?;
        let mut length = [0; 4];
        self.output.read_exact(&mut length)?;
        let mut body = vec![0; usize::try_from(u32::from_le_bytes(length))?];
        self.output.read_exact(&mut body)?;
        Ok(serde_json::from_slice(&body)?)
    }

    fn list(&mut self) -> Result<Vec<Found>> {
        match self.ask(&Ask::List)? {
            Answer::Listed { devices, .. } => Ok(devices),
            other => bail!("{other:?}"),
        }
    }

    fn read(&mut self, uuid: &str, own: &[u32], processes: bool) -> Result<Result<Reading, Trouble>> {
        let ask = Ask::Read {
            uuid: uuid.to_owned(),
            own: own.to_vec(),
            processes,
        };
        match self.ask(&ask)? {
            Answer::Read(reading) => Ok(Ok(reading)),
            Answer::Trouble(trouble) => Ok(Err(trouble)),
            other => bail!("{other:?}"),
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new(scenario: &Scenario) -> Result<Self> {
        let bench = Self {
            dir: tempfile::tempdir()?,
        };
        scenario.write(&bench.path())?;
        Ok(bench)
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("scenario.json")
    }

    fn probe(&self) -> Result<Probe> {
        Probe::start(&library()?, &self.path())
    }
}

fn named(found: &[Found]) -> Vec<&Identity> {
    found.iter().filter_map(|f| f.device.as_ref().ok()).collect()
}

#[test]
fn one_two_eight_and_sixteen_cards_of_one_name_are_told_apart_by_uuid_also_when_every_call_takes_4_ms()
-> Result<()> {
    for (count, slow_millis) in [(1, 0), (2, 0), (8, 0), (16, 4)] {
        let mut scenario = Scenario::cards(count);
        scenario.slow_millis = slow_millis;
        for (index, device) in (1..).zip(&mut scenario.devices) {
            device.part.used = index << 30;
        }
        let bench = Bench::new(&scenario)?;
        let mut probe = bench.probe()?;
        let found = probe.list()?;
        let names: Vec<_> = named(&found).into_iter().cloned().collect();
        ensure!(names.len() == usize::try_from(count)?, "{found:?}");
        for (index, identity) in (1_u64..).zip(&names) {
            ensure!(identity.name == "NVIDIA GeForce RTX 4090" && identity.capability == Some((8, 9)));
            let reading = probe
                .read(&identity.uuid, &[], false)?
                .map_err(|t| anyhow::anyhow!("{t:?}"))?;
            let wanted = Reading {
                total: 24 << 30,
                reserved: 1 << 30,
                used: index << 30,
                free: (23 - index) << 30,
                own: Own::NotAsked,
                busy_percent: Some(35),
                foreign_busy_percent: Some(35),
                celsius: Some(55),
                throttle: Some(Throttle::default()),
            };
            ensure!(reading == wanted, "{reading:?}");
        }
    }
    Ok(())
}

#[test]
fn one_lost_card_hides_only_itself_whether_it_was_lost_before_or_after_the_driver_was_loaded() -> Result<()> {
    for lost in [Lost::Calls, Lost::Handle] {
        let mut scenario = Scenario::cards(8);
        scenario.devices[3].lost = lost;
        let bench = Bench::new(&scenario)?;
        let mut probe = bench.probe()?;
        let found = probe.list()?;
        ensure!(found.len() == 8 && named(&found).len() == 7, "{found:?}");
        let Err(trouble) = &found[3].device else {
            bail!("{found:?}");
        };
        ensure!(
            trouble.lost && trouble.message.contains("fell off the bus"),
            "{trouble:?}"
        );
        for identity in named(&found) {
            ensure!(probe.read(&identity.uuid, &[], false)?.is_ok());
        }
    }
    // Lost while the probe runs.
    let mut scenario = Scenario::cards(2);
    let bench = Bench::new(&scenario)?;
    let mut probe = bench.probe()?;
    let uuids: Vec<String> = named(&probe.list()?).iter().map(|i| i.uuid.clone()).collect();
    scenario.devices[1].lost = Lost::Calls;
    scenario.write(&bench.path())?;
    ensure!(probe.read(&uuids[0], &[], false)?.is_ok());
    ensure!(matches!(
        probe.read(&uuids[1], &[], false)?,
        Err(Trouble { lost: true, .. })
    ));
    Ok(())
}

#[test]
fn parts_of_a_split_card_are_devices_of_their_own_and_a_card_without_parts_says_what_to_do() -> Result<()> {
    let mut scenario = Scenario::cards(3);
    let part = |n: u64| Part {
        uuid: format!("MIG-{n:08x}-0000-5000-8000-000000000000"),
        name: "NVIDIA A100-SXM4-40GB MIG 1g.5gb".into(),
        capability: (8, 0),
        total: 5 << 30,
        used: n << 20,
        ..Part::default()
    };
    scenario.devices[0].mig = Some(vec![part(1), part(2), part(3)]);
    scenario.devices[1].mig = Some(vec![]);
    let bench = Bench::new(&scenario)?;
    let mut probe = bench.probe()?;
    let found = probe.list()?;
    let uuids: Vec<&str> = named(&found).iter().map(|i| i.uuid.as_str()).collect();
    ensure!(
        uuids.len() == 5 && uuids[..3].iter().all(|u| u.starts_with("MIG-")),
        "{uuids:?}"
    );
    ensure!(
        named(&found)[3]
            .unusable
            .as_ref()
            .is_some_and(|why| why.contains("make one"))
    );
    ensure!(named(&found)[4].unusable.is_none());
    for (n, uuid) in (1..4_u64).zip(&uuids) {
        let reading = probe
            .read(uuid, &[], false)?
            .map_err(|t| anyhow::anyhow!("{t:?}"))?;
        ensure!(reading.total == 5 << 30 && reading.used == n << 20, "{reading:?}");
        ensure!(
            reading.busy_percent.is_none() && reading.celsius.is_none(),
            "not supported on parts"
        );
    }
    Ok(())
}

#[test]
fn our_processes_are_told_from_others_and_what_moves_or_is_not_said_is_no_number() -> Result<()> {
    let same = std::fs::read_link("/proc/self/ns/pid")?;
    if same != Path::new(INITIAL_PIDS) {
        println!(
            "in PID namespace {}: process ids can't be compared, which the next lines check",
            same.display()
        );
    }
    let same = same == Path::new(INITIAL_PIDS);
    let process = |pid, gib: Option<u64>, busy| Process {
        pid,
        bytes: gib.map(|g| g << 30),
        busy,
    };
    let read = |change: &dyn Fn(&mut Device)| -> Result<Reading> {
        let mut scenario = Scenario::cards(1);
        scenario.devices[0].part.processes = vec![process(7, Some(3), 40), process(8, Some(1), 25)];
        change(&mut scenario.devices[0]);
        let bench = Bench::new(&scenario)?;
        let mut probe = bench.probe()?;
        let uuid = named(&probe.list()?)[0].uuid.clone();
        probe
            .read(&uuid, &[7], true)?
            .map_err(|t| anyhow::anyhow!("{t:?}"))
    };
    let reading = read(&|_| {})?;
    if !same {
        ensure!(
            reading.own == Own::Unreadable && reading.foreign_busy_percent.is_none(),
            "{reading:?}"
        );
        return Ok(());
    }
    ensure!(
        reading.own == Own::Bytes(3 << 30) && reading.used == 6 << 30,
        "{reading:?}"
    );
    ensure!(
        reading.foreign_busy_percent == Some(25) && reading.busy_percent == Some(35),
        "{reading:?}"
    );
    let reading = read(&|d| d.part.growing = true)?;
    ensure!(reading.own == Own::Moved, "{reading:?}");
    let reading = read(&|d| d.part.processes[0].bytes = None)?;
    ensure!(reading.own == Own::Unreadable, "{reading:?}");
    let reading = read(&|d| d.part.by_process = false)?;
    ensure!(
        reading.foreign_busy_percent.is_none() && reading.busy_percent == Some(35),
        "{reading:?}"
    );
    // Too hot, by hardware and by software; too much power.
    for (bits, thermal, power) in [
        (0x40, true, false),
        (0x20, true, false),
        (0x04, false, true),
        (0x01, false, false),
    ] {
        let reading = read(&|d| d.part.throttle = bits)?;
        ensure!(
            reading.throttle == Some(Throttle { thermal, power }),
            "{bits:#x}: {reading:?}"
        );
    }
    Ok(())
}

#[test]
fn a_missing_old_or_broken_driver_says_which_it_is() -> Result<()> {
    let bench = Bench::new(&Scenario::cards(1))?;
    let dir = bench.dir.path();
    let said = |library: &Path| -> Result<String> {
        match Probe::start(library, &bench.path())?.ask(&Ask::List)? {
            Answer::NoDriver { message } => Ok(message),
            other => bail!("{other:?}"),
        }
    };
    let missing = said(Path::new("/nowhere/libnvidia-ml.so.1"))?;
    ensure!(missing.contains("/nowhere/libnvidia-ml.so.1"), "{missing}");
    let old = said(&library_without("nvmlInit_v2", dir)?)?;
    ensure!(old.contains("R510") && old.contains("nvmlInit_v2"), "{old}");
    for (code, word) in [(9, "not loaded"), (18, "not rebooted"), (4, "permission")] {
        let mut scenario = Scenario::cards(1);
        scenario.codes.insert("nvmlInit_v2".into(), code);
        scenario.write(&bench.path())?;
        let message = said(&library()?)?;
        ensure!(message.contains(word), "{code}: {message}");
    }
    // Old enough to lack one call: the devices are named, and can't be measured.
    Scenario::cards(1).write(&bench.path())?;
    let mut probe = Probe::start(
        &library_without("nvmlDeviceGetMemoryInfo_v2", dir)?,
        &bench.path(),
    )?;
    let uuid = named(&probe.list()?)[0].uuid.clone();
    let Err(trouble) = probe.read(&uuid, &[], false)? else {
        bail!("it was measured");
    };
    ensure!(!trouble.lost && trouble.message.contains("R510"), "{trouble:?}");
    // A symbol that only makes figures better may be missing.
    let mut probe = Probe::start(
        &library_without("nvmlDeviceGetUtilizationRates", dir)?,
        &bench.path(),
    )?;
    let uuid = named(&probe.list()?)[0].uuid.clone();
    let reading = probe
        .read(&uuid, &[], false)?
        .map_err(|t| anyhow::anyhow!("{t:?}"))?;
    ensure!(reading.busy_percent.is_none() && reading.used == 2 << 30);
    Ok(())
}

#[test]
fn a_driver_that_was_reset_answers_only_a_probe_that_loads_it_anew() -> Result<()> {
    let mut scenario = Scenario::cards(1);
    let bench = Bench::new(&scenario)?;
    let mut probe = bench.probe()?;
    let uuid = named(&probe.list()?)[0].uuid.clone();
    scenario.resets += 1;
    scenario.write(&bench.path())?;
    ensure!(probe.read(&uuid, &[], false)?.is_err());
    ensure!(matches!(probe.ask(&Ask::List)?, Answer::Trouble(_)));
    let mut probe = bench.probe()?;
    ensure!(named(&probe.list()?).len() == 1 && probe.read(&uuid, &[], false)?.is_ok());
    Ok(())
}

#[test]
fn a_probe_ends_with_its_agent_even_while_a_call_hangs() -> Result<()> {
    let mut scenario = Scenario::cards(1);
    scenario.hang = vec!["nvmlDeviceGetCount_v2".into()];
    scenario.calls = Some(std::env::temp_dir().join(format!("gogrid-hang-{}", std::process::id())));
    let bench = Bench::new(&scenario)?;
    let mut probe = bench.probe()?;
    probe.send(&Ask::List)?;
    let calls = scenario.calls.context("no log of calls")?;
    let began = Instant::now();
    let hanging = || std::fs::read_to_string(&calls).is_ok_and(|log| log.contains("nvmlDeviceGetCount_v2"));
    while !hanging() {
        ensure!(
            began.elapsed() < Duration::from_secs(30),
            "it never began to hang"
        );
        std::thread::yield_now();
    }
    probe.input = None;
    while probe.child.try_wait()?.is_none() {
        ensure!(began.elapsed() < Duration::from_secs(30), "it outlived its agent");
        std::thread::yield_now();
    }
    Ok(std::fs::remove_file(calls)?)
}
