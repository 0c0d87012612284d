//! `make images`: the three container images as OCI archives, each with its bill of materials, from programs that are already
//! built for release.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use gogrid_tests::images::Built;

const MIB: usize = 1 << 20;
/// Most that an operator image may take in a registry.
const OPERATOR_LIMIT: usize = 25 * MIB;
/// Most that agent and worker image may take together.
const NODE_LIMIT: usize = 60 * MIB;

/// Writes GoGrid's container images without a container tool.
#[derive(Parser)]
struct Arguments {
    /// Cargo's target directory with the programs.
    #[arg(long)]
    programs: PathBuf,
    /// Tag of all three.
    #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
    tag: String,
    /// Directory for the archives.
    #[arg(long)]
    out: PathBuf,
}

fn main() -> Result<()> {
    let Arguments { programs, tag, out } = Arguments::parse();
    std::fs::create_dir_all(&out).with_context(|| format!("creating {}", out.display()))?;
    let built = Built {
        operator: programs.join("x86_64-unknown-linux-musl/release/gogrid-operator"),
        agent: programs.join("release/gogrid-agent"),
        worker: programs.join("release/gogrid-worker"),
    };
    for (name, bill) in built.bills()? {
        let path = out.join(format!("gogrid-{name}-{tag}.cdx.json"));
        std::fs::write(&path, format!("{bill:#}\n"))
            .with_context(|| format!("writing {}", path.display()))?;
    }
    let images = built.images(&tag)?;
    for (name, image) in &images {
        let path = out.join(format!("gogrid-{name}-{tag}.tar"));
        std::fs::write(&path, &image.archive).with_context(|| format!("writing {}", path.display()))?;
        println!(
            "{:<9} {:>5.1} MiB  {}  {}",
            name,
            f64::from(u32::try_from(image.compressed)?) / 1_048_576.0,
            image.digest,
            path.display()
        );
    }
    let size = |name| images.get(name).map_or(0, |image| image.compressed);
    ensure!(
        size("operator") <= OPERATOR_LIMIT,
        "the operator's image must be at most {} MiB",
        OPERATOR_LIMIT / MIB
    );
    ensure!(
        size("agent") + size("worker") <= NODE_LIMIT,
        "the images of agent and worker must be at most {} MiB together",
        NODE_LIMIT / MIB
    );
    Ok(())
}
