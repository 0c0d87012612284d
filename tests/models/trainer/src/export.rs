//! Writing the trained weights as GGUF.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::quantized::{GgmlDType, QTensor};
use clap::Args;
use gogrid_testmodels::gguf_writer::{Header, file};
use gogrid_testmodels::quant::TensorType;
use gogrid_testmodels::random::{LlamaKeys, kind_of, set_tokenizer};
use gogrid_testmodels::vocab::{Encoder, MERGE, tokens};

use crate::model::{CONTEXT, FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, Model};
use crate::train::load;

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The checkpoint to export.
    #[arg(long)]
    checkpoint: PathBuf,
    /// Where the files go: `<prefix>-f16.gguf` and so on.
    #[arg(long)]
    prefix: String,
}

pub fn export(args: &ExportArgs) -> Result<()> {
    let encoder = Encoder::default();
    let model = Model::random(0, encoder.len())?;
    load(&args.checkpoint, &model, None)?;
    for (kind, dtype, suffix) in [
        (TensorType::F32, GgmlDType::F32, "f32"),
        (TensorType::F16, GgmlDType::F16, "f16"),
        (TensorType::Q8_0, GgmlDType::Q8_0, "q8_0"),
        (TensorType::Q4K, GgmlDType::Q4K, "q4_k"),
    ] {
        let path = format!("{}-{suffix}.gguf", args.prefix);
        fs::write(&path, gguf(&model, kind, dtype)?).with_context(|| path.clone())?;
        println!("{path}");
    }
    Ok(())
}

fn gguf(model: &Model, kind: TensorType, dtype: GgmlDType) -> Result<Vec<u8>> {
    let mut header = Header::default();
    header.set("general.architecture", "llama");
    header.set("general.name", "gogrid-demo");
    header.set("general.license", "Apache-2.0");
    header.set(
        "general.description",
        "Sums, differences, weekdays and words backwards, in fixed wordings",
    );
    let keys = LlamaKeys {
        layers: LAYERS,
        context: CONTEXT,
        hidden: HIDDEN,
        ffn: FFN,
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        vocab: tokens().len(),
    };
    keys.set(&mut header, kind);
    set_tokenizer(&mut header, tokens(), MERGE);
    let mut data = Vec::new();
    for (name, tensor) in model.named()? {
        let dims: Vec<usize> = tensor.dims().iter().rev().copied().collect();
        let dtype = if kind_of(&dims, kind) == TensorType::F32 {
            GgmlDType::F32
        } else {
            dtype
        };
        header.add_tensor(&name, &dims, kind_of(&dims, kind));
        // candle's quantiser searches for the best scales as ggml's does; this crate's own is plainer.
        data.push(QTensor::quantize(&tensor, dtype)?.data()?.into_owned());
    }
    Ok(file(&header, data.iter().map(Vec::as_slice)))
}
