//! The thread that keeps asking the driver, through the probe.
//!
//! Owns: that thread, which shares nothing with the Lease and everything that waits for a driver waits on. Must not
//! decide when to ask what: the watch of `gogrid_agent_core::driver` does.

use super::probe::Probe;
use crate::clock::{Host as _, Machine};
use crate::event::{Event, Hub};
use crate::metrics::Metrics;
use gogrid_agent_core::driver::watch::{Next, Silence, Timing, Watch};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// What the owner tells the thread.
enum Told {
    /// Our processes, and whether a job has a device of the driver.
    Own(Vec<u32>, bool),
    /// Let go of the driver, or hold it again.
    Released(bool),
}

/// The way to the thread.
pub(crate) struct Driver {
    told: mpsc::Sender<Told>,
    own: (Vec<u32>, bool),
    released: bool,
}

impl Driver {
    /// Our processes, and whether a job of ours has a device of the driver.
    pub(crate) fn own(&mut self, pids: Vec<u32>, busy: bool) {
        if self.own != (pids.clone(), busy) {
            self.own = (pids.clone(), busy);
            // It ends with the process only.
            let _ = self.told.send(Told::Own(pids, busy));
        }
    }

    /// Whether the node asks for the driver to be let go.
    pub(crate) fn released(&mut self, released: bool) {
        if self.released != released {
            self.released = released;
            let _ = self.told.send(Told::Released(released));
        }
    }
}

/// Starts the thread. `worker` says whether jobs can be run on the driver's devices.
pub(crate) fn start(
    library: Option<PathBuf>,
    timing: Timing,
    worker: bool,
    metrics: Arc<Metrics>,
    hub: Hub,
) -> io::Result<Driver> {
    let (told, orders) = mpsc::channel();
    let watch = Watch::new(timing, worker);
    std::thread::Builder::new()
        .name("driver".into())
        .spawn(move || keep(watch, &orders, library.as_ref(), &metrics, &hub))?;
    Ok(Driver {
        told,
        own: (vec![], false),
        released: false,
    })
}

fn command(library: Option<&PathBuf>) -> Command {
    let mut command = Command::new("/proc/self/exe");
    // It keeps the environment: where a driver's library lies is often told by it.
    command.arg0("gogrid-agent").arg("probe-nvml");
    if let Some(library) = library {
        command.arg("--library").arg(library);
    }
    command
}

/// Whether the node's kernel has the driver: its directories show through into containers, as its library does not.
fn in_kernel(root: &Path) -> bool {
    ["proc/driver/nvidia/version", "sys/module/nvidia"]
        .iter()
        .any(|path| root.join(path).exists())
}

fn keep(
    mut watch: Watch,
    orders: &mpsc::Receiver<Told>,
    library: Option<&PathBuf>,
    metrics: &Metrics,
    hub: &Hub,
) {
    let mut probe = Probe::new(|| command(library));
    loop {
        if let Some(mut view) = watch.news() {
            view.kernel = in_kernel(Path::new("/"));
            hub.send_blocking(Event::Driver(Box::new(view)));
        }
        let order = match watch.next(Machine.boottime()) {
            Next::Ask(ask, limit) => {
                let outcome = probe.ask(&ask, limit);
                if let Err(silence) = &outcome {
                    let how = match silence {
                        Silence::Late => "late",
                        Silence::Ended(_) => "ended",
                    };
                    metrics.driver_silences.with_label_values(&[how]).inc();
                    tracing::warn!(?silence, ?ask, "the NVIDIA driver does not answer");
                }
                watch.heard(outcome, Machine.boottime());
                orders.try_recv().ok()
            }
            Next::End => {
                probe.end();
                None
            }
            Next::Wait(until) => {
                let wait = Duration::from_nanos(until.saturating_sub(Machine.boottime()));
                match orders.recv_timeout(wait) {
                    Ok(told) => Some(told),
                    Err(mpsc::RecvTimeoutError::Timeout) => None,
                    Err(mpsc::RecvTimeoutError::Disconnected) => return,
                }
            }
        };
        match order {
            Some(Told::Own(pids, busy)) => watch.set_own(pids, busy),
            Some(Told::Released(released)) => watch.set_released(released, Machine.boottime()),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_in_the_kernel_is_known_by_either_of_its_directories() {
        for path in ["proc/driver/nvidia/version", "sys/module/nvidia"] {
            let root = tempfile::tempdir().unwrap();
            assert!(!in_kernel(root.path()));
            std::fs::create_dir_all(root.path().join(path)).unwrap();
            assert!(in_kernel(root.path()), "{path}");
        }
    }
}
