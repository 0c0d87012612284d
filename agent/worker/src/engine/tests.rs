use super::batch::{Answer, Batch, Event};
use super::load::{Loader, Size, check};
use super::{Engine, EngineError, Words};
use candle_core::Device;
use gogrid_agent_core::protocol::{Finish, Sampling};
use gogrid_testmodels::demo::{Quant, demo_model_path, prompts};
use gogrid_testmodels::quant::TensorType;
use gogrid_testmodels::random::{RandomLlama, random_llama};
use gogrid_testmodels::tasks::Split;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn size(context_tokens: u32, parallel_sequences: u16) -> Size {
    Size {
        context_tokens,
        parallel_sequences,
        memory: 0,
    }
}

fn load(file: File, size: Size) -> Result<Engine, EngineError> {
    let checked = check(&file)?;
    let words = Words::from_checked(&checked)?;
    let mut loader = Loader::begin(file, &checked, size)?;
    while loader.step(&Device::Cpu)? {}
    Engine::new(loader, words)
}

fn engine(shape: &RandomLlama, parallel: u16) -> Engine {
    load(
        file(&random_llama(shape)),
        size(u32::try_from(shape.context).unwrap(), parallel),
    )
    .unwrap()
}

fn sampling(max_tokens: u32, temperature_milli: u32, seed: u64) -> Sampling {
    Sampling {
        max_tokens,
        temperature_milli,
        top_p_milli: 1000,
        top_k: 0,
        seed,
        stop: Vec::new(),
    }
}

/// Runs the batch to its end.
fn finish(engine: &mut Engine, batch: &mut Batch, rows: usize) -> BTreeMap<u64, Answer> {
    let mut answers = BTreeMap::new();
    while !batch.is_empty() {
        for event in batch.advance(engine, rows).unwrap().into_iter().flatten() {
            if let Event::Finished(key, answer) = event {
                answers.insert(key, answer);
            }
        }
    }
    answers
}

fn alone(engine: &mut Engine, prompt: &[u32], sampling: &Sampling, rows: usize) -> Answer {
    let mut batch = Batch::new(1);
    batch.add(0, prompt.to_vec(), sampling).unwrap();
    finish(engine, &mut batch, rows).remove(&0).unwrap()
}

/// A text of every token, so that sampled answers of random models can be compared.
fn prompt(length: u32, seed: u32) -> Vec<u32> {
    (0..length).map(|i| (i * 37 + seed * 101) % 250 + 2).collect()
}

const KINDS: [TensorType; 6] = TensorType::ALL;

#[test]
fn an_answer_in_a_batch_is_the_answer_alone_bit_for_bit_whatever_the_chunks() {
    for kind in KINDS {
        let mut engine = engine(
            &RandomLlama {
                tensor_type: kind,
                ..RandomLlama::default()
            },
            5,
        );
        let prompts: Vec<_> = (0..5).map(|i| prompt(3 + i * 17, i)).collect();
        let sampling: Vec<_> = (0..5).map(|i| sampling(20 + i * 4, 900, u64::from(i))).collect();
        let expected: Vec<_> = prompts
            .iter()
            .zip(&sampling)
            .map(|(prompt, sampling)| alone(&mut engine, prompt, sampling, 64))
            .collect();
        for rows in [1, 7, 64] {
            let mut batch = Batch::new(5);
            for (key, (prompt, sampling)) in (0..).zip(prompts.iter().zip(&sampling)) {
                batch.add(key, prompt.clone(), sampling).unwrap();
            }
            let answers = finish(&mut engine, &mut batch, rows);
            for (key, expected) in (0..).zip(&expected) {
                assert_eq!(
                    answers[&key].text, expected.text,
                    "{kind:?}, chunks of {rows}, sequence {key}"
                );
                assert_eq!(answers[&key].completion_tokens, expected.completion_tokens);
            }
            if rows == 64 {
                assert_eq!(answers.values().map(|answer| answer.batch).max(), Some(5));
            }
        }
    }
}

#[test]
fn scores_do_not_depend_on_the_other_rows_of_a_step() {
    use super::model::Row;
    for kind in KINDS {
        let mut engine = engine(
            &RandomLlama {
                tensor_type: kind,
                ..RandomLlama::default()
            },
            3,
        );
        let run = |engine: &mut Engine, rows: &[Row]| {
            let mut pass = engine.model.begin(rows.to_vec()).unwrap();
            while !engine.model.advance(&mut pass, &mut engine.cache).unwrap() {}
            pass.scores().to_vec()
        };
        let row = |slot, position, token| Row {
            slot,
            position,
            token,
            scored: true,
        };
        let one = run(&mut engine, &[row(0, 0, 17)]);
        let many = run(
            &mut engine,
            &[row(1, 0, 200), row(0, 0, 17), row(2, 0, 3), row(2, 1, 9)],
        );
        let vocabulary = engine.model.vocabulary();
        let bits = |scores: &[f32]| scores.iter().map(|score| score.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&one), bits(&many[vocabulary..2 * vocabulary]), "{kind:?}");
    }
}

/// Small sizes are exact as doubles.
fn f(value: usize) -> f64 {
    f64::from(u32::try_from(value).unwrap())
}

/// The decoder once more, slowly and in doubles, straight from the definition.
fn oracle(shape: &RandomLlama, bytes: &[u8], tokens: &[u32]) -> Vec<f64> {
    let header = gogrid_gguf::Header::parse(
        bytes,
        bytes.len().try_into().unwrap(),
        &gogrid_gguf::Limits::default(),
    )
    .unwrap();
    let tensor = |name: &str| -> Vec<f64> {
        let info = header.tensor(name).unwrap_or_else(|| panic!("{name}"));
        let range = usize::try_from(info.offset).unwrap()..usize::try_from(info.offset + info.bytes).unwrap();
        bytes[range]
            .chunks(4)
            .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
            .collect()
    };
    let times = |weights: &[f64], x: &[f64]| -> Vec<f64> {
        weights
            .chunks(x.len())
            .map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum())
            .collect()
    };
    let epsilon = f64::from(header.f32("llama.attention.layer_norm_rms_epsilon").unwrap());
    let base = f64::from(header.f32_or("llama.rope.freq_base", 10_000.0).unwrap());
    let norm = |x: &[f64], weights: &[f64]| -> Vec<f64> {
        let mean = x.iter().map(|v| v * v).sum::<f64>() / f(x.len());
        x.iter()
            .zip(weights)
            .map(|(v, w)| v / (mean + epsilon).sqrt() * w)
            .collect()
    };
    let width = shape.head_dim;
    let rope = |x: &mut [f64], position: usize| {
        for head in x.chunks_mut(width) {
            for pair in 0..width / 2 {
                let angle = f(position) * base.powf(-2.0 * f(pair) / f(width));
                let (a, b) = (head[2 * pair], head[2 * pair + 1]);
                head[2 * pair] = a * angle.cos() - b * angle.sin();
                head[2 * pair + 1] = a * angle.sin() + b * angle.cos();
            }
        }
    };
    let embeddings = tensor("token_embd.weight");
    let mut keys = vec![Vec::<Vec<f64>>::new(); shape.layers];
    let mut values = keys.clone();
    let mut scores = Vec::new();
    for (position, token) in tokens.iter().enumerate() {
        let at = usize::try_from(*token).unwrap() * shape.hidden;
        let mut x = embeddings[at..at + shape.hidden].to_vec();
        for layer in 0..shape.layers {
            let weights = |name: &str| tensor(&format!("blk.{layer}.{name}.weight"));
            let normed = norm(&x, &weights("attn_norm"));
            let (mut q, mut k) = (
                times(&weights("attn_q"), &normed),
                times(&weights("attn_k"), &normed),
            );
            rope(&mut q, position);
            rope(&mut k, position);
            keys[layer].push(k);
            values[layer].push(times(&weights("attn_v"), &normed));
            let mut attended = Vec::new();
            for head in 0..shape.heads {
                let from = head / (shape.heads / shape.kv_heads) * width;
                let query = &q[head * width..(head + 1) * width];
                let raw: Vec<f64> = keys[layer]
                    .iter()
                    .map(|k| {
                        let dot: f64 = query.iter().zip(&k[from..from + width]).map(|(a, b)| a * b).sum();
                        (dot / f(width).sqrt()).exp()
                    })
                    .collect();
                let sum: f64 = raw.iter().sum();
                attended.extend((0..width).map(|i| {
                    raw.iter()
                        .zip(&values[layer])
                        .map(|(w, v)| w / sum * v[from + i])
                        .sum::<f64>()
                }));
            }
            let out = times(&weights("attn_output"), &attended);
            x.iter_mut().zip(out).for_each(|(x, o)| *x += o);
            let normed = norm(&x, &weights("ffn_norm"));
            let (gate, up) = (
                times(&weights("ffn_gate"), &normed),
                times(&weights("ffn_up"), &normed),
            );
            let inner: Vec<f64> = gate
                .iter()
                .zip(up)
                .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                .collect();
            let out = times(&weights("ffn_down"), &inner);
            x.iter_mut().zip(out).for_each(|(x, o)| *x += o);
        }
        let normed = norm(&x, &tensor("output_norm.weight"));
        scores = times(
            &tensor(if shape.tied {
                "token_embd.weight"
            } else {
                "output.weight"
            }),
            &normed,
        );
    }
    scores
}

#[test]
fn scores_are_those_of_the_definition() {
    use super::model::Row;
    for tied in [false, true] {
        let shape = RandomLlama {
            tensor_type: TensorType::F32,
            tied,
            heads: 8,
            kv_heads: 2,
            head_dim: 32,
            ..RandomLlama::default()
        };
        let bytes = random_llama(&shape);
        let tokens = prompt(12, 5);
        let expected = oracle(&shape, &bytes, &tokens);
        let mut engine = engine(&shape, 1);
        let rows = (0..).zip(&tokens).map(|(position, token)| Row {
            slot: 0,
            position,
            token: *token,
            scored: position == 11,
        });
        let mut pass = engine.model.begin(rows.collect()).unwrap();
        while !engine.model.advance(&mut pass, &mut engine.cache).unwrap() {}
        let largest = expected.iter().fold(0.0_f64, |most, score| most.max(score.abs()));
        for (found, expected) in pass.scores().iter().zip(&expected) {
            assert!(
                (f64::from(*found) - expected).abs() < 1e-4 * largest.max(1.0),
                "{found} {expected}"
            );
        }
    }
}

#[test]
fn a_prompt_goes_on_while_others_decode() {
    let mut engine = engine(&RandomLlama::default(), 3);
    let mut batch = Batch::new(3);
    for key in 0..2 {
        batch.add(key, prompt(2, 1), &sampling(200, 5000, key)).unwrap();
    }
    batch.add(2, prompt(40, 2), &sampling(1, 5000, 2)).unwrap();
    let mut steps = 0;
    let mut first = None;
    while first.is_none() {
        for event in batch.advance(&mut engine, 1).unwrap().into_iter().flatten() {
            if let Event::Finished(key, _) = event {
                first.get_or_insert(key);
            }
        }
        steps += 1;
    }
    assert_eq!((first, batch.len()), (Some(2), 2), "after {steps} layers");
}

#[test]
fn a_generation_ends_at_its_limit_and_at_the_end_of_the_context() {
    let mut engine = engine(
        &RandomLlama {
            context: 32,
            ..RandomLlama::default()
        },
        1,
    );
    let answer = alone(&mut engine, &prompt(4, 1), &sampling(5, 700, 1), 64);
    assert!(answer.completion_tokens <= 5);
    let answer = alone(&mut engine, &prompt(30, 1), &sampling(500, 700, 2), 64);
    assert!(answer.completion_tokens <= 3, "{answer:?}");
    let answer = alone(&mut engine, &prompt(32, 1), &sampling(500, 700, 4), 64);
    assert!(
        answer.completion_tokens <= 1 && answer.prompt_tokens == 32,
        "{answer:?}"
    );
    if answer.completion_tokens == 1 {
        assert_eq!(answer.finish, Finish::Length);
    }
}

#[test]
fn a_stop_text_ends_the_answer_before_it_and_never_comes_out() {
    let mut engine = engine(&RandomLlama::default(), 1);
    let whole = alone(&mut engine, &prompt(6, 2), &sampling(60, 1000, 3), 64).text;
    let stop: String = whole.chars().skip(8).take(3).collect();
    let with = Sampling {
        stop: vec![stop.clone()],
        ..sampling(60, 1000, 3)
    };
    let mut batch = Batch::new(1);
    batch.add(0, prompt(6, 2), &with).unwrap();
    let (mut streamed, mut answer) = (String::new(), None);
    while !batch.is_empty() {
        for event in batch.advance(&mut engine, 64).unwrap().into_iter().flatten() {
            match event {
                Event::Text(_, text) => streamed.push_str(&text),
                Event::Finished(_, found) => answer = Some(found),
            }
        }
    }
    let answer = answer.unwrap();
    assert_eq!(answer.finish, Finish::Stop);
    assert_eq!(answer.text, whole[..whole.find(&stop).unwrap()]);
    assert_eq!(streamed, answer.text);
}

#[test]
fn a_model_that_does_not_fit_is_refused_with_both_numbers() {
    let bytes = random_llama(&RandomLlama::default());
    let error = load(
        file(&bytes),
        Size {
            memory: 1 << 20,
            ..size(256, 4)
        },
    )
    .err()
    .unwrap();
    assert_eq!(error.reason(), "OutOfMemory");
    assert!(error.to_string().contains(&(1 << 20).to_string()), "{error}");
}

#[test]
fn damaged_files_are_refused_by_name() {
    let bytes = random_llama(&RandomLlama::default());
    let reason = |bytes: &[u8]| load(file(bytes), size(64, 1)).err().map(|error| error.reason());
    assert_eq!(reason(b"PK\x03\x04 not a model at all"), Some("NotGguf"));
    assert_eq!(reason(&bytes[..bytes.len() - 100]), Some("TruncatedModel"));
    assert_eq!(reason(&bytes[..200]), Some("TruncatedModel"));
    let replaced = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let mut bytes = bytes.clone();
        let mut places: Vec<usize> = (0..bytes.len() - from.len())
            .filter(|at| bytes[*at..].starts_with(from.as_bytes()))
            .collect();
        for at in places.drain(..) {
            bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
        }
        reason(&bytes)
    };
    assert_eq!(
        replaced("llama-bpe", "viking-qu").or(replaced("llama3", "viking")),
        Some("UnsupportedTokenizer")
    );
    assert_eq!(replaced("blk.1.ffn_up", "blk.1.ffn_xx"), Some("InvalidModel"));
    assert_eq!(
        replaced("output_norm.weight", "output_warm.weight"),
        Some("InvalidModel")
    );
}

#[test]
fn any_flipped_byte_of_the_header_is_an_error_or_a_model_but_never_a_panic() {
    let bytes = random_llama(&RandomLlama {
        layers: 1,
        ..RandomLlama::default()
    });
    for at in (0..6000).step_by(61) {
        for value in [0x00, 0xff] {
            let mut bytes = bytes.clone();
            bytes[at] ^= value | 1;
            if let Ok(mut engine) = load(file(&bytes), size(16, 1)) {
                let mut batch = Batch::new(1);
                batch.add(0, vec![5, 6], &sampling(2, 0, 0)).unwrap();
                finish(&mut engine, &mut batch, 8);
            }
        }
    }
}

/// Right answers of the demo model, of `n` held-out questions.
fn demo(path: &std::path::Path, n: usize) -> Option<usize> {
    let Ok(file) = File::open(path) else {
        eprintln!("SKIPPED: {} is not there", path.display());
        return None;
    };
    let mut engine = load(file, size(64, 8)).unwrap();
    let questions = prompts(11, n, Split::HeldOut);
    let mut right = 0;
    for group in questions.chunks(8) {
        let mut batch = Batch::new(8);
        for (key, (question, _)) in (0..).zip(group) {
            let tokens = engine.tokenizer.prompt(&format!("{question}\n")).unwrap();
            batch.add(key, tokens, &sampling(16, 0, 0)).unwrap();
        }
        let answers = finish(&mut engine, &mut batch, 64);
        right += (0..)
            .zip(group)
            .filter(|(key, (_, expected))| answers[key].text.trim() == expected.trim())
            .count();
    }
    Some(right)
}

#[test]
fn the_demo_model_answers_questions_it_was_not_trained_on() {
    for quant in Quant::ALL {
        if let Some(right) = demo(&demo_model_path(quant), 200) {
            let least = if quant == Quant::Q4K { 180 } else { 190 };
            assert!(right >= least, "{quant:?}: {right} of 200");
        }
    }
}

#[test]
fn the_demo_models_answers_are_the_golden_ones() {
    let golden =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/models/golden/answers.tsv");
    let Ok(golden) = std::fs::read_to_string(&golden) else {
        eprintln!("SKIPPED: {} is not there", golden.display());
        return;
    };
    for quant in [Quant::F16, Quant::Q8_0] {
        let Ok(file) = File::open(demo_model_path(quant)) else {
            eprintln!("SKIPPED: {quant:?} of the demo model is not there");
            continue;
        };
        let mut engine = load(file, size(64, 1)).unwrap();
        for line in golden.lines() {
            let mut fields = line.split('\t');
            let (question, expected) = (fields.next().unwrap(), fields.next().unwrap());
            let message = super::template::Message {
                role: "user".into(),
                content: question.into(),
            };
            let text = engine.template.as_ref().unwrap().render(&[message]).unwrap();
            let tokens = engine.tokenizer.prompt(&text).unwrap();
            assert_eq!(
                alone(&mut engine, &tokens, &sampling(16, 0, 0), 64).text,
                expected,
                "{quant:?} {question}"
            );
        }
    }
}
