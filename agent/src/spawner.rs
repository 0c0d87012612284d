//! The pool as a child of the agent, where no second container runs it.
//!
//! Owns: one permanent thread that starts the pool again whenever it ends. The kernel kills the pool when that thread
//! ends, so it must outlive everything. Must not speak to the pool.

use crate::event::{Event, Hub};
use crate::previous::Processes;
use crate::sys;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Between an end of the pool and its next start.
const PAUSE: Duration = Duration::from_secs(1);

/// How the pool is started.
pub(crate) struct Pool {
    /// Its program.
    pub(crate) worker: PathBuf,
    /// Where it connects.
    pub(crate) socket: PathBuf,
    /// Where workers stamp their steps, in tests.
    pub(crate) stamps: Option<PathBuf>,
}

/// Starts the thread. Dropping the answer does not end it: it lasts as long as the process.
pub(crate) fn start(
    pool: Pool,
    processes: Arc<Mutex<Processes>>,
    hub: Hub,
) -> io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new().name("spawner".into()).spawn(move || {
        loop {
            run(&pool, &processes);
            // No pool beside a worker of the one before.
            loop {
                let gone = processes.lock().unwrap_or_else(PoisonError::into_inner).end_all();
                let Err(error) = gone else { break };
                tracing::error!(%error, "workers of the ended pool may still run: trying again");
                std::thread::park_timeout(PAUSE);
            }
            hub.send_blocking(Event::PoolEnded);
            std::thread::park_timeout(PAUSE);
        }
    })
}

fn run(pool: &Pool, processes: &Mutex<Processes>) {
    let Pool {
        worker,
        socket,
        stamps,
    } = pool;
    let mut command = Command::new(worker);
    command
        .arg("pool")
        .arg("--socket")
        .arg(socket)
        .arg("--die-with-parent")
        .stdin(Stdio::null());
    if let Some(stamps) = stamps {
        command.arg("--stamps").arg(stamps);
    }
    // The pool sees no token, no kubeconfig and nothing else of the agent's environment.
    command.env_clear();
    let mut child = match sys::spawn_bound(&mut command) {
        Ok(child) => child,
        Err(error) => {
            tracing::error!(%error, program = %worker.display(), "could not start the pool");
            return;
        }
    };
    let noted = processes
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .add(child.id());
    if let Err(error) = noted {
        // A pool that is not written down could outlive the session unseen.
        tracing::error!(%error, "could not record the pool");
        let _ = child.kill();
    }
    match child.wait() {
        Ok(status) => tracing::warn!(%status, "the pool ended"),
        Err(error) => tracing::error!(%error, "could not wait for the pool"),
    }
}
