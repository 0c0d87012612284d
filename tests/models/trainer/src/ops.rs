//! The four operations whose backward pass candle lacks: RMSNorm, SwiGLU, and causal grouped-query attention with
//! its rotary positions. Sequences lie one after another without padding; `starts` says where each begins.

use std::sync::{Arc, LazyLock};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::model::{CONTEXT, EPSILON, HEAD_DIM, HEADS, KV_HEADS, QKV, ROPE_BASE};

/// Rows a thread works on at once. Fixed, so that sums come out the same with any number of threads.
const ROWS: usize = 64;

fn flat<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((from, to)) = layout.contiguous_offsets() else {
        bail!("a contiguous tensor is needed")
    };
    Ok(&storage.as_slice::<f32>()?[from..to])
}

/// Runs `f` on the tensor's numbers without copying them.
pub fn with_slice<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        candle_core::Storage::Cpu(cpu) => f(flat(cpu, layout)?),
        _ => bail!("the trainer runs on the CPU"),
    }
}

pub struct RmsNorm;

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (flat(x, lx)?, flat(w, lw)?);
        let n = w.len();
        let mut out = vec![0.0; x.len()];
        out.par_chunks_mut(n * ROWS)
            .zip(x.par_chunks(n * ROWS))
            .for_each(|(out, x)| {
                for (out, x) in out.chunks_mut(n).zip(x.chunks(n)) {
                    let inverse = inverse_rms(x);
                    for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
                        *out = x * inverse * w;
                    }
                }
            });
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let n = w.elem_count();
        let (dx, dw) = with_slice(x, |x| {
            with_slice(w, |w| {
                with_slice(grad, |grad| {
                    let mut dx = vec![0.0; x.len()];
                    let parts: Vec<Vec<f32>> = dx
                        .par_chunks_mut(n * ROWS)
                        .zip(x.par_chunks(n * ROWS).zip(grad.par_chunks(n * ROWS)))
                        .map(|(dx, (x, grad))| {
                            let mut dw = vec![0.0; n];
                            for ((dx, x), g) in dx.chunks_mut(n).zip(x.chunks(n)).zip(grad.chunks(n)) {
                                let inverse = inverse_rms(x);
                                let mut mixed = 0.0;
                                for i in 0..n {
                                    mixed += g[i] * w[i] * x[i];
                                    dw[i] += g[i] * x[i] * inverse;
                                }
                                let pull = mixed * inverse * inverse / n as f32;
                                for i in 0..n {
                                    dx[i] = inverse * (g[i] * w[i] - x[i] * pull);
                                }
                            }
                            dw
                        })
                        .collect();
                    let mut dw = vec![0.0; n];
                    for part in &parts {
                        dw.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                    }
                    Ok((dx, dw))
                })
            })
        })?;
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), x.device())?),
            Some(Tensor::from_vec(dw, w.shape(), w.device())?),
        ))
    }
}

fn inverse_rms(x: &[f32]) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + EPSILON).sqrt()
}

/// A dot product in eight lanes, which the compiler turns into vector code without changing the order of sums.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 8];
    for (a, b) in a.chunks_exact(8).zip(b.chunks_exact(8)) {
        for i in 0..8 {
            lanes[i] += a[i] * b[i];
        }
    }
    lanes.iter().sum()
}

fn add_scaled(to: &mut [f32], from: &[f32], scale: f32) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from * scale;
    }
}

/// `silu(gate) × up`, where each row holds the gate's half and then the up half.
pub struct SwiGlu;

impl CustomOp1 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = flat(x, layout)?;
        let (rows, width) = layout.shape().dims2()?;
        let half = width / 2;
        let mut out = vec![0.0; rows * half];
        out.par_chunks_mut(half * ROWS)
            .zip(x.par_chunks(width * ROWS))
            .for_each(|(out, x)| {
                for (out, x) in out.chunks_mut(half).zip(x.chunks(width)) {
                    for i in 0..half {
                        out[i] = x[i] / (1.0 + (-x[i]).exp()) * x[half + i];
                    }
                }
            });
        Ok((CpuStorage::F32(out), Shape::from((rows, half))))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, width) = x.dims2()?;
        let half = width / 2;
        let dx = with_slice(x, |x| {
            with_slice(grad, |grad| {
                let mut dx = vec![0.0; x.len()];
                dx.par_chunks_mut(width * ROWS)
                    .zip(x.par_chunks(width * ROWS).zip(grad.par_chunks(half * ROWS)))
                    .for_each(|(dx, (x, grad))| {
                        for ((dx, x), g) in dx.chunks_mut(width).zip(x.chunks(width)).zip(grad.chunks(half)) {
                            for i in 0..half {
                                let sigmoid = 1.0 / (1.0 + (-x[i]).exp());
                                dx[i] = g[i] * x[half + i] * sigmoid * (1.0 + x[i] * (1.0 - sigmoid));
                                dx[half + i] = g[i] * x[i] * sigmoid;
                            }
                        }
                    });
                Ok(dx)
            })
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

/// Attention over rows of queries, keys and values side by side; positions start at 0 in every sequence.
pub struct Attention {
    /// Where each sequence starts, and at the end the number of rows.
    pub starts: Arc<Vec<usize>>,
}

const SCALE: f32 = 0.125; // 1/√64

impl Attention {
    /// Splits a buffer of `width` numbers a row into one slice a sequence.
    fn split<'a>(&self, mut all: &'a mut [f32], width: usize) -> Vec<&'a mut [f32]> {
        let mut parts = Vec::with_capacity(self.starts.len());
        for pair in self.starts.windows(2) {
            let (part, rest) = all.split_at_mut((pair[1] - pair[0]) * width);
            parts.push(part);
            all = rest;
        }
        parts
    }

    fn sequence<'a>(&self, x: &'a [f32], index: usize, width: usize) -> &'a [f32] {
        &x[self.starts[index] * width..self.starts[index + 1] * width]
    }
}

/// Sine and cosine of every position and pair.
static ANGLES: LazyLock<Vec<(f32, f32)>> = LazyLock::new(|| {
    let angle =
        |position: usize, pair: usize| position as f32 * ROPE_BASE.powf(-2.0 * pair as f32 / HEAD_DIM as f32);
    (0..CONTEXT * HEAD_DIM / 2)
        .map(|i| angle(i / (HEAD_DIM / 2), i % (HEAD_DIM / 2)).sin_cos())
        .collect()
});

/// Copies the rows and turns their queries and keys by their positions (back, for `sign` −1).
fn rotated(rows: &[f32], sign: f32) -> Vec<f32> {
    let mut out = rows.to_vec();
    for (position, row) in out.chunks_mut(QKV).enumerate() {
        for pair in 0..HEAD_DIM / 2 {
            let (sin, cos) = ANGLES[position * (HEAD_DIM / 2) + pair];
            let sin = sin * sign;
            for head in 0..HEADS + KV_HEADS {
                let at = head * HEAD_DIM + 2 * pair;
                let (a, b) = (row[at], row[at + 1]);
                row[at] = a * cos - b * sin;
                row[at + 1] = a * sin + b * cos;
            }
        }
    }
    out
}

fn query(rows: &[f32], i: usize, head: usize) -> &[f32] {
    &rows[i * QKV + head * HEAD_DIM..][..HEAD_DIM]
}

fn key(rows: &[f32], i: usize, head: usize) -> &[f32] {
    query(rows, i, HEADS + head / (HEADS / KV_HEADS))
}

fn value(rows: &[f32], i: usize, head: usize) -> &[f32] {
    query(rows, i, HEADS + KV_HEADS + head / (HEADS / KV_HEADS))
}

fn probabilities(rows: &[f32], i: usize, head: usize) -> Vec<f32> {
    let q = query(rows, i, head);
    let mut p: Vec<f32> = (0..=i).map(|j| dot(q, key(rows, j, head)) * SCALE).collect();
    let top = p.iter().copied().fold(f32::MIN, f32::max);
    let mut sum = 0.0;
    for p in &mut p {
        *p = (*p - top).exp();
        sum += *p;
    }
    p.iter_mut().for_each(|p| *p /= sum);
    p
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "causal-attention"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = flat(x, layout)?;
        let width = HEADS * HEAD_DIM;
        let rows = x.len() / QKV;
        let mut out = vec![0.0; rows * width];
        self.split(&mut out, width)
            .into_par_iter()
            .enumerate()
            .for_each(|(index, out)| {
                let x = rotated(self.sequence(x, index, QKV), 1.0);
                for (i, out) in out.chunks_mut(width).enumerate() {
                    for (head, out) in out.chunks_mut(HEAD_DIM).enumerate() {
                        for (j, p) in probabilities(&x, i, head).into_iter().enumerate() {
                            add_scaled(out, value(&x, j, head), p);
                        }
                    }
                }
            });
        Ok((CpuStorage::F32(out), Shape::from((rows, width))))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let width = HEADS * HEAD_DIM;
        let dx = with_slice(x, |all| {
            with_slice(grad, |grad| {
                let mut dx = vec![0.0; all.len()];
                self.split(&mut dx, QKV)
                    .into_par_iter()
                    .enumerate()
                    .for_each(|(index, dx)| {
                        let x = rotated(self.sequence(all, index, QKV), 1.0);
                        let grad = self.sequence(grad, index, width);
                        for (i, g) in grad.chunks(width).enumerate() {
                            for (head, g) in g.chunks(HEAD_DIM).enumerate() {
                                // Rows whose output nobody used (most of the last layer's) have no gradient.
                                if g.iter().all(|g| *g == 0.0) {
                                    continue;
                                }
                                let p = probabilities(&x, i, head);
                                let dp: Vec<f32> = (0..=i).map(|j| dot(g, value(&x, j, head))).collect();
                                let mean: f32 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
                                let group = head / (HEADS / KV_HEADS);
                                for j in 0..=i {
                                    let ds = p[j] * (dp[j] - mean) * SCALE;
                                    let mut slot = |row: usize, part: usize, from: &[f32], scale: f32| {
                                        add_scaled(
                                            &mut dx[row * QKV + part * HEAD_DIM..][..HEAD_DIM],
                                            from,
                                            scale,
                                        );
                                    };
                                    slot(i, head, key(&x, j, head), ds);
                                    slot(j, HEADS + group, query(&x, i, head), ds);
                                    slot(j, HEADS + KV_HEADS + group, g, p[j]);
                                }
                            }
                        }
                        let back = rotated(dx, -1.0);
                        dx.copy_from_slice(&back);
                    });
                Ok(dx)
            })
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};
    use gogrid_testmodels::rng::Rng;

    fn random(seed: u64, rows: usize, width: usize) -> Tensor {
        let mut rng = Rng::new(seed);
        let data: Vec<f32> = (0..rows * width).map(|_| rng.normal()).collect();
        Tensor::from_vec(data, (rows, width), &Device::Cpu).unwrap()
    }

    /// Compares the backward pass of `f` with differences of its forward pass, weighted at random.
    fn check(x: &Tensor, f: impl Fn(&Tensor) -> Tensor) {
        let var = Var::from_tensor(x).unwrap();
        let weights = f(var.as_tensor()).randn_like(0.0, 1.0).unwrap();
        let score = |x: &Tensor| (f(x) * &weights).unwrap().sum_all().unwrap();
        let grads = score(var.as_tensor()).backward().unwrap();
        let grad: Vec<f32> = grads
            .get(var.as_tensor())
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        let values: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
        let mut rng = Rng::new(4);
        for _ in 0..60 {
            let at = rng.index(values.len());
            let moved = |by: f32| {
                let mut values = values.clone();
                values[at] += by;
                score(&Tensor::from_vec(values, x.shape(), &Device::Cpu).unwrap())
                    .to_scalar::<f32>()
                    .unwrap()
            };
            let slope = (moved(0.01) - moved(-0.01)) / 0.02;
            assert!(
                (slope - grad[at]).abs() < 0.03 + 0.03 * slope.abs(),
                "{slope} and {}",
                grad[at]
            );
        }
    }

    #[test]
    fn the_gradients_of_rms_norm_match_its_slopes() {
        let weight = random(2, 1, 64).squeeze(0).unwrap();
        check(&random(1, 3, 64), |x| x.apply_op2(&weight, RmsNorm).unwrap());
        let x = random(1, 70, 64);
        check(&weight, |weight| x.apply_op2(weight, RmsNorm).unwrap());
    }

    #[test]
    fn the_gradients_of_swiglu_match_its_slopes() {
        check(&random(3, 3, 64), |x| x.apply_op1(SwiGlu).unwrap());
    }

    #[test]
    fn the_gradients_of_attention_match_its_slopes() {
        let starts = Arc::new(vec![0, 3, 4, 9]);
        check(&random(5, 9, QKV), |x| {
            x.apply_op1(Attention {
                starts: Arc::clone(&starts),
            })
            .unwrap()
        });
    }

    #[test]
    fn sequences_do_not_see_each_other_nor_what_comes_later() {
        let starts = Arc::new(vec![0, 3, 9]);
        let run = |x: &Tensor| -> Vec<Vec<f32>> {
            x.apply_op1(Attention {
                starts: Arc::clone(&starts),
            })
            .unwrap()
            .to_vec2()
            .unwrap()
        };
        let x = random(6, 9, QKV);
        let changed = Tensor::cat(&[x.narrow(0, 0, 8).unwrap(), random(7, 1, QKV)], 0).unwrap();
        let (before, after) = (run(&x), run(&changed));
        assert_eq!(before[..8], after[..8]);
        assert_ne!(before[8], after[8]);
    }
}
