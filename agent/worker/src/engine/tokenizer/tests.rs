use super::*;
use std::fs::File;
use std::path::PathBuf;

/// Vocabularies and golden tokens made by llama.cpp; they are not part of the repository.
fn golden(name: &str) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/tokenizers");
    let path = folder.join(format!("ggml-vocab-{name}.gguf"));
    if !path.exists() {
        eprintln!(
            "SKIPPED: {} is not there, so the {name} tokenizer was not compared",
            path.display()
        );
        return;
    }
    let mut file = File::open(&path).unwrap();
    let length = file.metadata().unwrap().len();
    let header = gogrid_gguf::parse_from(&mut file, length, &gogrid_gguf::Limits::default()).unwrap();
    let tokenizer = Tokenizer::from_header(&header).unwrap();
    let inputs = std::fs::read_to_string(path.with_extension("gguf.inp")).unwrap();
    let outputs = std::fs::read_to_string(path.with_extension("gguf.out")).unwrap();
    let inputs: Vec<&str> = inputs.split("\n__ggml_vocab_test__\n").collect();
    let outputs: Vec<&str> = outputs.lines().collect();
    assert!(
        inputs.len() > 10 && outputs.len() >= inputs.len() - 1,
        "{} {}",
        inputs.len(),
        outputs.len()
    );
    let mut wrong = Vec::new();
    for (input, output) in inputs.iter().zip(&outputs) {
        let expected: Vec<u32> = output.split_whitespace().map(|id| id.parse().unwrap()).collect();
        let found = tokenizer.encode(input, false).unwrap();
        if found != expected {
            wrong.push(format!("{input:?}: {found:?}, expected {expected:?}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {} differ:\n{}",
        wrong.len(),
        inputs.len(),
        wrong.join("\n")
    );
}

#[test]
fn llama_bpe_splits_as_llama_cpp_does() {
    golden("llama-bpe");
}

#[test]
fn gpt_2_splits_as_llama_cpp_does() {
    golden("gpt-2");
}

#[test]
fn qwen2_splits_as_llama_cpp_does() {
    golden("qwen2");
}

#[test]
fn llama_spm_splits_as_llama_cpp_does() {
    golden("llama-spm");
}

#[test]
fn an_unknown_pre_tokenizer_is_an_error_that_names_it() {
    let error = pre::PreTokenizer::named("viking").err().unwrap();
    assert_eq!(error.reason(), "UnsupportedTokenizer");
    assert!(error.to_string().contains("\"viking\""), "{error}");
}
