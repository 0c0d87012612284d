//! Files, ports and flags of the three processes, and when each of them is ready.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Api;
use kube::config::{KubeConfigOptions, Kubeconfig};

use super::{Binaries, ControlPlaneOptions};
use crate::ports;
use crate::process::Process;
use crate::wait::eventually;

pub(crate) const DIR_PREFIX: &str = "gogrid-controlplane-";
const ETCD_WITHIN: Duration = Duration::from_secs(60);
/// One look takes this long at most; a connection made while the server was starting may never be answered.
const PROBE_WITHIN: Duration = Duration::from_secs(5);
const LOG_LINES: usize = 15;
/// A name that every API server's certificate bears.
const SERVER_NAME: &str = "kubernetes.default.svc";

/// Writes by anyone are recorded with who, what and when, never with content; reads are not.
const AUDIT_POLICY: &str = "\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived, ResponseStarted, Panic]
rules:
- level: Metadata
  verbs: [create, update, patch, delete, deletecollection]
- level: Metadata
  verbs: [get, list, watch]
  userGroups: [\"system:serviceaccounts:gogrid-system\"]
- level: None
";

/// A user that identifies itself with a token.
#[derive(Clone, Debug)]
pub struct User {
    /// Such as `system:node:node-1`.
    pub name: String,
    /// The one group it is in, if any.
    pub group: String,
    /// Its secret.
    pub token: String,
}

/// A network namespace in which the control plane runs and other machines reach it.
#[derive(Clone, Debug)]
pub struct Network {
    /// The namespace's file, `/proc/<pid>/ns/net`.
    pub namespace: PathBuf,
    /// The API server's address there; it listens on port 443.
    pub address: Ipv4Addr,
    /// Port on this machine's loopback that leads to it.
    pub port: u16,
}

/// A port that was free when it was chosen was taken when it was used.
#[derive(Debug, thiserror::Error)]
#[error("another program took the port of {process}")]
pub(super) struct PortTaken {
    process: String,
}

/// Everything about one control plane that is decided before its first process starts.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) dir: PathBuf,
    pub(super) admin_token: String,
    controllers_token: String,
    etcd_port: u16,
    etcd_peer_port: u16,
    pub(super) port: u16,
    api_server_flags: Vec<String>,
    users: Vec<User>,
    network: Option<Network>,
}

impl Layout {
    /// Chooses ports and secrets and writes the files that the processes read.
    pub(super) fn prepare(options: &ControlPlaneOptions) -> Result<Self> {
        let dir = match &options.dir {
            Some(dir) => {
                fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
                dir.canonicalize()?
            }
            None => tempfile::Builder::new()
                .prefix(&format!("{DIR_PREFIX}{}-", std::process::id()))
                .tempdir()
                .context("creating a temporary directory")?
                .keep(),
        };
        let layout = Self {
            admin_token: random_token()?,
            controllers_token: random_token()?,
            etcd_port: ports::fixed()?.port(),
            etcd_peer_port: ports::fixed()?.port(),
            port: match options.network.as_ref().map(|n| n.port).or(options.port) {
                Some(port) => port,
                None => ports::fixed()?.port(),
            },
            api_server_flags: options.api_server_flags.clone(),
            users: options.users.clone(),
            network: options.network.clone(),
            dir,
        };
        layout.write_files()?;
        Ok(layout)
    }

    fn write_files(&self) -> Result<()> {
        let key = self.path("service-accounts.key");
        if !key.exists() {
            write_private(&key, &signing_key()?)?;
        }
        let mut tokens = format!(
            "{},admin,admin,system:masters\n{},system:kube-controller-manager,controllers\n",
            self.admin_token, self.controllers_token
        );
        for User { name, group, token } in &self.users {
            tokens += &format!("{token},{name},{name},{group}\n");
        }
        write_private(&self.path("tokens.csv"), &tokens)?;
        write_private(&self.path("audit-policy.yaml"), AUDIT_POLICY)?;
        write_private(&self.admin_kubeconfig(), &self.kubeconfig(&self.admin_token))?;
        write_private(
            &self.path("controllers.kubeconfig"),
            &self.inner_kubeconfig(&self.controllers_token),
        )
    }

    pub(super) fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    pub(super) fn ca_file(&self) -> PathBuf {
        self.path("certs").join("apiserver.crt")
    }

    pub(super) fn admin_kubeconfig(&self) -> PathBuf {
        self.path("admin.kubeconfig")
    }

    pub(super) fn audit_log(&self) -> PathBuf {
        self.path("audit.log")
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The text of a kubeconfig for use on this machine.
    pub(super) fn kubeconfig(&self, token: &str) -> String {
        self.kubeconfig_with(&self.url(), &serde_json::json!({"token": token}))
    }

    /// The same, with the token in a file.
    pub(super) fn kubeconfig_for_file(&self, token: &Path) -> String {
        self.kubeconfig_with(&self.url(), &serde_json::json!({"tokenFile": token}))
    }

    /// The same for a program that reaches the API server by another address, which its certificate doesn't name.
    pub(super) fn kubeconfig_through(&self, address: SocketAddr, token: &Path) -> String {
        let mut config = self.kubeconfig_json(
            &format!("https://{address}"),
            &serde_json::json!({"tokenFile": token}),
        );
        config["clusters"][0]["cluster"]["tls-server-name"] = SERVER_NAME.into();
        config.to_string()
    }

    /// The same for a program that runs where the API server does.
    pub(super) fn inner_kubeconfig(&self, token: &str) -> String {
        match &self.network {
            Some(network) => {
                let server = format!("https://{}", network.address);
                self.kubeconfig_with(&server, &serde_json::json!({"token": token}))
            }
            None => self.kubeconfig(token),
        }
    }

    /// JSON, which is YAML too, so that nothing needs quoting by hand.
    fn kubeconfig_with(&self, server: &str, user: &serde_json::Value) -> String {
        self.kubeconfig_json(server, user).to_string()
    }

    fn kubeconfig_json(&self, server: &str, user: &serde_json::Value) -> serde_json::Value {
        let mut cluster = serde_json::json!({"server": server, "certificate-authority": self.ca_file()});
        if self.network.is_some() {
            // Its certificate doesn't name the loopback address that leads to it.
            cluster["tls-server-name"] = SERVER_NAME.into();
        }
        serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "user", "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "user"}}],
            "current-context": "test",
        })
    }

    /// A command that runs where the API server does.
    pub(super) fn command(&self, program: &Path) -> Command {
        match &self.network {
            None => Command::new(program),
            Some(network) => {
                let mut command = Command::new("nsenter");
                // It becomes the program: the process that is started is the one that is signalled.
                command
                    .arg(format!("--net={}", network.namespace.display()))
                    .arg("--")
                    .arg(program);
                command
            }
        }
    }

    fn etcd_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.etcd_port)
    }

    pub(super) fn start_etcd(&self, binaries: &Binaries) -> Result<Process> {
        let clients = self.etcd_url();
        let peers = format!("http://127.0.0.1:{}", self.etcd_peer_port);
        let mut command = self.command(&binaries.etcd());
        command
            .arg(format!("--data-dir={}", self.path("etcd").display()))
            .arg(format!("--listen-client-urls={clients}"))
            .arg(format!("--advertise-client-urls={clients}"))
            .arg(format!("--listen-peer-urls={peers}"))
            .arg(format!("--initial-advertise-peer-urls={peers}"))
            .arg(format!("--initial-cluster=default={peers}"))
            // The data need not survive this machine's power failure, only etcd's own.
            .args(["--unsafe-no-fsync", "--log-level=warn"]);
        Process::start("etcd", command, &self.path("etcd.log"))
    }

    pub(super) async fn until_etcd_listens(&self, etcd: &Process) -> Result<()> {
        if self.network.is_some() {
            // Out of reach from here; the API server waits for it as well.
            return Ok(());
        }
        until(etcd, ETCD_WITHIN, "etcd to listen", || async {
            Ok(drop(
                tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, self.etcd_port)).await?,
            ))
        })
        .await
    }

    pub(super) fn start_api_server(&self, binaries: &Binaries) -> Result<Process> {
        let key = self.path("service-accounts.key");
        let mut command = self.command(&binaries.api_server());
        command
            .arg(format!("--etcd-servers={}", self.etcd_url()))
            .args(self.address_flags())
            .arg(format!("--cert-dir={}", self.path("certs").display()))
            .args([
                "--service-account-issuer=https://kubernetes.default.svc",
                "--api-audiences=api",
            ])
            .arg(format!("--service-account-key-file={}", key.display()))
            .arg(format!("--service-account-signing-key-file={}", key.display()))
            .arg(format!("--token-auth-file={}", self.path("tokens.csv").display()))
            .args([
                "--authorization-mode=Node,RBAC",
                "--allow-privileged=true",
                "--profiling=false",
            ])
            .arg(format!(
                "--audit-policy-file={}",
                self.path("audit-policy.yaml").display()
            ))
            .arg(format!("--audit-log-path={}", self.audit_log().display()))
            // One file for good: whoever reads it knows it by its name.
            .arg("--audit-log-maxsize=1000000")
            .args(&self.api_server_flags);
        Process::start("kube-apiserver", command, &self.path("kube-apiserver.log"))
    }

    fn address_flags(&self) -> Vec<String> {
        match &self.network {
            None => vec![
                "--bind-address=127.0.0.1".into(),
                "--service-cluster-ip-range=10.0.0.0/24".into(),
                // The default writes the server's address where a loopback address is refused.
                "--endpoint-reconciler-type=none".into(),
                format!("--secure-port={}", self.port),
            ],
            Some(network) => vec![
                "--bind-address=0.0.0.0".into(),
                "--secure-port=443".into(),
                // Its first address leads to the API server without a Service proxy: see `nodes`.
                "--service-cluster-ip-range=10.96.0.0/16".into(),
                format!("--advertise-address={}", network.address),
                "--kubelet-preferred-address-types=InternalIP".into(),
                "--enable-admission-plugins=NodeRestriction".into(),
            ],
        }
    }

    pub(super) async fn until_ready(&self, api_server: &Process, within: Duration) -> Result<()> {
        until(api_server, within, "the API server to be ready", || async {
            let request = http::Request::get("/readyz").body(Vec::new())?;
            let answer = self.client().await?.request_text(request).await?;
            ensure!(answer == "ok", "/readyz says {answer:?}");
            Ok(())
        })
        .await
    }

    pub(super) fn start_controllers(&self, binaries: &Binaries) -> Result<Process> {
        let mut command = self.command(&binaries.controller_manager());
        command
            .arg(format!(
                "--kubeconfig={}",
                self.path("controllers.kubeconfig").display()
            ))
            .args([
                "--use-service-account-credentials=true",
                "--leader-elect=false",
                "--secure-port=0",
            ])
            .arg(format!(
                "--service-account-private-key-file={}",
                self.path("service-accounts.key").display()
            ))
            .arg(format!("--root-ca-file={}", self.ca_file().display()))
            .arg(if self.network.is_some() {
                "--controllers=*"
            } else {
                // No kubelet renews a Lease here: these three would taint the nodes and end the pods on them, and with
                // the pods the tokens bound to them.
                "--controllers=*,-node-lifecycle-controller,-taint-eviction-controller,\
                 -pod-garbage-collector-controller"
            });
        if self.network.is_some() {
            command
                // What takes 40 s by default; tests have less time.
                .args(["--node-monitor-grace-period=12s", "--node-monitor-period=1s"])
                .args(["--kube-api-qps=200", "--kube-api-burst=400"])
                .arg(format!(
                    "--flex-volume-plugin-dir={}",
                    self.path("volume-plugins").display()
                ));
        }
        Process::start(
            "kube-controller-manager",
            command,
            &self.path("kube-controller-manager.log"),
        )
    }

    /// Waits for the one object that every test depends on and only a controller makes.
    pub(super) async fn until_controllers_act(&self, controllers: &Process, within: Duration) -> Result<()> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client().await?, "default");
        until(
            controllers,
            within,
            "the controllers to make the default service account",
            || async {
                accounts.get("default").await?;
                Ok(())
            },
        )
        .await
    }

    async fn client(&self) -> Result<kube::Client> {
        let kubeconfig = Kubeconfig::from_yaml(&self.kubeconfig(&self.admin_token))?;
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        Ok(kube::Client::try_from(config)?)
    }
}

/// Waits until `probe` succeeds, but not for a process that has ended.
async fn until<F, Fut>(process: &Process, within: Duration, what: &str, probe: F) -> Result<()>
where
    F: Fn() -> Fut,
    Fut: Future<Output = Result<()>>,
{
    let seen = || async {
        if process.is_running() {
            tokio::time::timeout(PROBE_WITHIN, probe()).await??;
            return Ok(Ok(()));
        }
        if process.log_tail(LOG_LINES).contains("address already in use") {
            return Ok(Err(anyhow::Error::new(PortTaken {
                process: process.name().to_owned(),
            })));
        }
        Ok(Err(anyhow!(
            "{} ended early: {:?}",
            process.name(),
            process.exit()
        )))
    };
    let outcome: Result<Result<()>> = eventually(within, what, seen).await;
    outcome.and_then(|ended| ended).with_context(|| {
        format!(
            "{}; its last lines:\n{}",
            process.name(),
            process.log_tail(LOG_LINES)
        )
    })
}

fn random_bytes<const COUNT: usize>() -> Result<[u8; COUNT]> {
    let mut bytes = [0; COUNT];
    fs::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .context("reading /dev/urandom")?;
    Ok(bytes)
}

/// A secret that nobody guesses.
pub(crate) fn random_token() -> Result<String> {
    Ok(random_bytes::<16>()?
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// A fresh P-256 key as SEC 1 PEM. Any number below the curve's order is one, and its public half follows from it.
fn signing_key() -> Result<String> {
    const BEFORE: [u8; 7] = [0x30, 0x31, 0x02, 0x01, 0x01, 0x04, 0x20];
    const NAMED_CURVE_P256: [u8; 12] = [
        0xa0, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07,
    ];
    let mut number: [u8; 32] = random_bytes()?;
    // The order begins with 32 one bits.
    number[0] &= 0x7f;
    let der = [&BEFORE[..], &number, &NAMED_CURVE_P256].concat();
    let serde_json::Value::String(base64) = serde_json::to_value(ByteString(der))? else {
        return Err(anyhow!("bytes are base64 text in the Kubernetes API"));
    };
    Ok(format!(
        "-----BEGIN EC PRIVATE KEY-----\n{base64}\n-----END EC PRIVATE KEY-----\n"
    ))
}

/// Writes a file that nobody else may read.
pub(super) fn write_private(path: &Path, content: &str) -> Result<()> {
    fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(content.as_bytes()))
        .with_context(|| format!("writing {}", path.display()))
}

/// Removes what test programs left that were killed before they could; the kernel has ended their processes.
pub(super) fn sweep_abandoned_dirs() {
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix(DIR_PREFIX))
            .and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
