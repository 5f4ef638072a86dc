//! Attention kernels against their definition in f64.

mod common;

use common::{Storage, Uniform, assert_close, values};
use half::{bf16, f16};
use host_kernels::{Argument, Buffer, Launch, LaunchError, shuffled};

/// A head size, and how its kernels are launched.
#[derive(Clone, Copy)]
struct Head {
    dim: usize,
    forward: Plan,
}

/// Rows of a block, its threads and its shared memory.
#[derive(Clone, Copy)]
struct Plan {
    rows: usize,
    threads: u32,
    shared_bytes: u32,
}

const fn plan(rows: usize, threads: u32, shared_bytes: u32) -> Plan {
    Plan { rows, threads, shared_bytes }
}

const HEADS: [Head; 4] = [
    Head { dim: 40, forward: plan(128, 128, 20480) },
    Head { dim: 64, forward: plan(128, 128, 36864) },
    Head { dim: 80, forward: plan(64, 128, 45056) },
    Head { dim: 160, forward: plan(64, 128, 43008) },
];

/// One attention problem: B images, H heads, sequences of queries and keys.
#[derive(Clone, Copy, Debug)]
struct Problem {
    images: usize,
    heads: usize,
    dim: usize,
    queries: usize,
    keys: usize,
    causal: bool,
}

impl Problem {
    fn width(&self) -> usize {
        self.heads * self.dim
    }

    fn scale(&self) -> f64 {
        // Steeper than 1/√D: with numbers in −1…1 the weights of keys then differ by an order of magnitude.
        f64::from(4.0 / (self.dim as f32).sqrt())
    }
}

/// The inputs as stored, `[B, S, H·D]` each.
struct Inputs<T> {
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
}

impl<T: Storage> Inputs<T> {
    fn random(problem: &Problem, seed: u64) -> Self {
        let mut random = Uniform(seed);
        let (q, k) = (problem.images * problem.queries, problem.images * problem.keys);
        let width = problem.width();
        Self { q: random.numbers(q * width), k: random.numbers(k * width), v: random.numbers(k * width) }
    }
}

/// What attention is: `o [B, queries, H·D]`, `lse [B, H, queries]`, and the weights `[B, H, queries, keys]`.
struct Definition {
    o: Vec<f64>,
    lse: Vec<f64>,
    weights: Vec<f64>,
}

impl Definition {
    fn of<T: Storage>(problem: &Problem, inputs: &Inputs<T>) -> Self {
        let Problem { images, heads, dim, queries, keys, causal } = *problem;
        let (q, k, v) = (values(&inputs.q), values(&inputs.k), values(&inputs.v));
        let at = |image: usize, length: usize, row: usize, head: usize| {
            ((image * length + row) * heads + head) * dim
        };
        let mut definition = Self { o: vec![0.0; q.len()], lse: Vec::new(), weights: Vec::new() };
        for (image, head) in (0..images).flat_map(|image| (0..heads).map(move |head| (image, head))) {
            for row in 0..queries {
                let query = at(image, queries, row, head);
                let scores: Vec<f64> = (0..keys)
                    .map(|key| {
                        let from = at(image, keys, key, head);
                        let score: f64 = (0..dim).map(|i| q[query + i] * k[from + i]).sum();
                        if causal && key > row { f64::NEG_INFINITY } else { score * problem.scale() }
                    })
                    .collect();
                let lse = scores.iter().map(|score| score.exp()).sum::<f64>().ln();
                for (key, score) in scores.iter().enumerate() {
                    let weight = (score - lse).exp();
                    let from = at(image, keys, key, head);
                    for i in 0..dim {
                        definition.o[query + i] += weight * v[from + i];
                    }
                    definition.weights.push(weight);
                }
                definition.lse.push(lse);
            }
        }
        definition
    }
}

/// Weights are rounded to T before they meet the values, and sums of values once more at the end: each errs by half an
/// epsilon of numbers up to 1. A quarter more for sums and exponentials in f32.
const FORWARD_EPSILONS: f64 = 1.25;
/// A logarithm of f32 sums of f32 exponentials.
const LSE_TOLERANCE: f64 = 1e-5;

fn forward<T: Storage>(head: Head, problem: &Problem, seed: u64) -> Result<(), LaunchError> {
    let inputs = Inputs::<T>::random(problem, seed);
    let expected = Definition::of(problem, &inputs);
    let (q, k, v) =
        (Buffer::from_slice(&inputs.q), Buffer::from_slice(&inputs.k), Buffer::from_slice(&inputs.v));
    let (o, lse) = (Buffer::<T>::unwritten(expected.o.len()), Buffer::<f32>::unwritten(expected.lse.len()));
    let name = format!("attention_forward_{}_d{}", T::NAME, head.dim);
    let width = problem.width() as i32;
    let plan = head.forward;
    let mut arguments: Vec<Argument<'_>> =
        vec![(&o).into(), (&lse).into(), (&q).into(), (&k).into(), (&v).into()];
    arguments.extend(
        [problem.queries as i32, problem.keys as i32, width, width, width, width].map(Argument::from),
    );
    arguments.extend([Argument::from(problem.scale() as f32), i32::from(problem.causal).into()]);
    Launch {
        name: &name,
        grid: [problem.queries.div_ceil(plan.rows) as u32, problem.heads as u32, problem.images as u32],
        block: [plan.threads, 1, 1],
        shared_bytes: plan.shared_bytes,
    }
    .run(&arguments)?;
    let what = format!("{name} of {problem:?}");
    assert_close(&what, &o, &expected.o, FORWARD_EPSILONS * T::EPSILON);
    assert_close(&format!("lse, {what}"), &lse, &expected.lse, LSE_TOLERANCE);
    Ok(())
}

fn forward_at_all_sizes<T: Storage>() -> Result<(), LaunchError> {
    for head in HEADS {
        let rows = head.forward.rows;
        let sizes = [(1, 1), (rows - 1, 63), (rows, 64), (rows + 1, 65), (37, 77), (16, 131)];
        for (i, (queries, keys)) in sizes.into_iter().enumerate() {
            let problem =
                Problem { images: 1 + i % 2, heads: 2, dim: head.dim, queries, keys, causal: false };
            forward::<T>(head, &problem, 7 + i as u64)?;
        }
    }
    Ok(())
}

#[test]
fn forward_f16() -> Result<(), LaunchError> {
    forward_at_all_sizes::<f16>()
}

#[test]
fn forward_bf16() -> Result<(), LaunchError> {
    forward_at_all_sizes::<bf16>()
}

#[test]
fn forward_causal() -> Result<(), LaunchError> {
    for head in HEADS {
        for length in [1, 77, 150] {
            let problem =
                Problem { images: 1, heads: 2, dim: head.dim, queries: length, keys: length, causal: true };
            forward::<f16>(head, &problem, 3)?;
        }
    }
    Ok(())
}

#[test]
fn forward_in_any_order_of_threads() -> Result<(), LaunchError> {
    for (seed, head) in HEADS.into_iter().enumerate() {
        let problem = Problem { images: 1, heads: 1, dim: head.dim, queries: 70, keys: 150, causal: false };
        shuffled(seed as u64 + 1, || forward::<f16>(head, &problem, 5))?;
    }
    Ok(())
}
