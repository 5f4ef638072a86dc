//! The shim itself: it computes what a card computes, and finds the errors that it says it finds.

use half::{bf16, f16};
use host_kernels::{Argument, Buffer, Launch, LaunchError, Number, SANITIZER, shuffled};

fn probe(name: &str, blocks: u32, threads: u32, shared_bytes: u32) -> Launch<'_> {
    Launch { name, grid: [blocks, 1, 1], block: [threads, 1, 1], shared_bytes, cluster: 1 }
}

#[test]
fn a_block_sums() -> Result<(), LaunchError> {
    for threads in [32, 64, 256] {
        let values: Vec<f32> = (0..2 * threads).map(|i| i as f32).collect();
        let expected: Vec<f32> = values.chunks(threads).map(|block| block.iter().sum()).collect();
        let sums = Buffer::<f32>::unwritten(2);
        probe("probe_block_sum", 2, threads as u32, 128)
            .run(&[(&sums).into(), (&Buffer::from_slice(&values)).into()])?;
        assert_eq!(sums.to_vec(), expected);
    }
    Ok(())
}

/// Small whole numbers, whose products and sums are exact in every order.
fn products_are_exact<T: Number>(name: &str, number: impl Fn(f32) -> T) -> Result<(), LaunchError> {
    for depth in [8, 16, 24, 40] {
        let whole =
            |count, step| -> Vec<f32> { (0..count).map(|i| ((i * step) % 13) as f32 - 6.0).collect() };
        let (a, b) = (whole(16 * depth, 5), whole(depth * 8, 7));
        let buffer =
            |values: &[f32]| Buffer::from_slice(&values.iter().map(|&x| number(x)).collect::<Vec<T>>());
        let d = Buffer::<f32>::unwritten(16 * 8);
        let shared = 2 * 24 * depth as u32;
        probe(name, 1, 32, shared).run(&[
            (&d).into(),
            (&buffer(&a)).into(),
            (&buffer(&b)).into(),
            (depth as i32).into(),
        ])?;
        for (i, &got) in d.to_vec().iter().enumerate() {
            let (row, column) = (i / 8, i % 8);
            let expected: f32 = (0..depth).map(|k| a[row * depth + k] * b[k * 8 + column]).sum();
            assert_eq!(got, expected, "{name}: depth {depth}, row {row}, column {column}");
        }
    }
    Ok(())
}

#[test]
fn tensor_core_products_are_products() -> Result<(), LaunchError> {
    products_are_exact("probe_product_f16", f16::from_f32)?;
    products_are_exact("probe_product_bf16", bf16::from_f32)
}

#[test]
fn numbers_are_rounded_to_the_nearest() -> Result<(), LaunchError> {
    let mut values =
        vec![0.0, -0.0, f32::INFINITY, 65504.0, 65519.9, 65520.0, 1e-8, 2.98e-8, 2.99e-8, 6.1e-5, 3.4e38];
    // Every 16-bit number, and the midpoints between neighbours, where ties go to even.
    for bits in 0..0x7c00u16 {
        let (low, high) = (f16::from_bits(bits).to_f32(), f16::from_bits(bits + 1).to_f32());
        values.extend([low, -low]);
        values.extend(high.is_finite().then_some((low + high) / 2.0));
        values.push(f32::from_bits(u32::from(bits) << 16 | 0x8000));
    }
    let (half, brain) = (Buffer::<f16>::unwritten(values.len()), Buffer::<bf16>::unwritten(values.len()));
    let given = Buffer::from_slice(&values);
    let arguments = [(&half).into(), (&brain).into(), (&given).into(), (values.len() as i32).into()];
    probe("probe_round", 1, 32, 0).run(&arguments)?;
    for ((&x, half), brain) in values.iter().zip(half.to_vec()).zip(brain.to_vec()) {
        assert_eq!(half.to_bits(), f16::from_f32(x).to_bits(), "{x:e}");
        assert_eq!(brain.to_bits(), bf16::from_f32(x).to_bits(), "{x:e}");
    }
    Ok(())
}

#[test]
fn a_missing_barrier_shows() -> Result<(), LaunchError> {
    let run = |barrier: i32, seed| {
        let values = Buffer::<f32>::unwritten(64);
        shuffled(seed, || probe("probe_race", 1, 64, 256).run(&[(&values).into(), barrier.into()]))?;
        Ok::<_, LaunchError>(values.to_vec().iter().map(|x| x.to_bits()).collect::<Vec<_>>())
    };
    assert_eq!(run(1, 0)?, run(1, 1)?);
    if SANITIZER == "thread" {
        assert_found(run(0, 0), BY_SANITIZER);
    } else {
        assert_ne!(run(0, 0)?, run(0, 1)?);
    }
    Ok(())
}

#[test]
fn blocks_race() {
    let values = Buffer::<f32>::unwritten(64);
    let ran = probe("probe_blocks_race", 4096, 64, 0).run(&[(&values).into()]);
    let beside_each_other = std::thread::available_parallelism().is_ok_and(|threads| threads.get() > 1);
    if SANITIZER == "thread" && beside_each_other {
        assert_found(ran, BY_SANITIZER);
    } else {
        assert!(ran.is_ok());
    }
}

const BY_SANITIZER: &str = "a sanitizer found";

fn assert_found<T>(result: Result<T, LaunchError>, expected: &str) {
    let why = result.err().map(|error| error.to_string()).unwrap_or_default();
    assert!(why.contains(expected), "{expected}: {why:?}");
}

#[test]
fn errors_are_found() -> Result<(), LaunchError> {
    let run = |error: i32| {
        let values = Buffer::from_slice(&(0..64).map(|i| i as f32).collect::<Vec<_>>());
        probe("probe_error", 1, 64, 256).run(&[(&values).into(), error.into()])?;
        Ok::<_, LaunchError>(values.to_vec())
    };
    assert_found(run(1), "at a barrier for others");
    assert_found(run(2), "lanes of a warp wait");
    assert_found(run(3), "not aligned");
    assert_found(run(4), if SANITIZER == "address" { BY_SANITIZER } else { "outside of its shared memory" });
    assert_found(run(9), "has not taken its turn");
    assert_found(run(10), "a copy begins before");
    let neighbours: Vec<f32> = (0..64).map(|i| (i ^ 1) as f32).collect();
    assert_eq!(run(0)?, neighbours);
    // The copy came too late to undo the exchange of neighbours, as it may on a card.
    if SANITIZER != "thread" {
        assert_eq!(run(5)?, neighbours);
    }
    for (error, sanitizer) in [(5, "thread"), (6, "address"), (7, "address"), (8, "thread")] {
        if sanitizer == SANITIZER {
            assert_found(run(error), BY_SANITIZER);
        }
    }
    Ok(())
}

#[test]
fn errors_of_warpgroups_are_found() -> Result<(), LaunchError> {
    let run = |error: i32| {
        let sums = Buffer::<f32>::unwritten(128);
        let ones = Buffer::from_slice(&[f16::ONE; 8]);
        probe("probe_warpgroup", 1, 128, 224 * 128).run(&[(&sums).into(), (&ones).into(), error.into()])?;
        Ok::<_, LaunchError>(sums.to_vec())
    };
    assert_eq!(run(0)?, [80.0 * 16.0; 128]);
    assert!(run(1)?.iter().all(|sum| sum.is_nan()));
    assert_found(run(2), "without warpgroup_begin");
    assert_found(
        run(3),
        if SANITIZER == "thread" { BY_SANITIZER } else { "changed while a product read it" },
    );
    assert_found(run(4), "ends before its products");
    assert_found(run(5), "want different products");
    assert_found(run(6), "outside of its shared memory");
    Ok(())
}

#[test]
fn a_launch_is_checked() {
    let values = Buffer::from_slice(&[1.0f32; 64]);
    let refused = |launch: Launch<'_>, arguments: &[Argument<'_>], expected: &str| {
        let why = launch.run(arguments).expect_err(expected).to_string();
        assert!(why.contains(expected), "{why}");
    };
    refused(probe("scale", 1, 32, 0), &[], "no such kernel");
    refused(
        probe("scale_f32", 1, 32, 0),
        &[(&values).into(), 1i32.into(), 1i32.into()],
        "parameters are pfi",
    );
    let arguments = [(&values).into(), 2.0f32.into(), 64i32.into()];
    refused(probe("scale_f32", 1, 257, 0), &arguments, "bounds");
    refused(probe("scale_f32", 1, 32, 1 << 20), &arguments, "shared memory");
}

/// What the probe leaves: both rounds, each block, each thread.
fn cluster(blocks: u32, cluster: u32, error: i32, seed: u64) -> Result<Vec<f32>, LaunchError> {
    let results = Buffer::<f32>::unwritten(2 * 64 * blocks as usize);
    let values = Buffer::from_slice(&(0..2 * 16 * cluster + 4).map(|i| i as f32).collect::<Vec<_>>());
    let launch = Launch { cluster, ..probe("probe_cluster", blocks, 64, 128 * 4 + 8) };
    let arguments = [(&results).into(), (&values).into(), error.into()];
    shuffled(seed, || launch.run(&arguments))?;
    Ok(results.to_vec())
}

/// The same by definition.
fn received(blocks: u32, cluster: u32) -> Vec<f32> {
    let of_round = |round: u32| {
        (0..blocks * 64).map(move |thread| (round * 16 * cluster + thread % 64 % (16 * cluster)) as f32)
    };
    (0..2).flat_map(of_round).collect()
}

#[test]
fn blocks_of_a_cluster_send_each_other_copies() -> Result<(), LaunchError> {
    for (blocks, size) in [(3, 1), (6, 2), (8, 4), (8, 8)] {
        for seed in 0..4 {
            assert_eq!(cluster(blocks, size, 0, seed)?, received(blocks, size), "{size} together");
        }
    }
    assert_found(cluster(6, 4, 0, 0), "no whole clusters");
    assert_found(cluster(9, 9, 0, 0), "1 to 8 blocks");
    Ok(())
}

#[test]
fn errors_of_clusters_are_found() {
    let not_waited = if SANITIZER == "thread" { BY_SANITIZER } else { "before the time is over" };
    assert_found(cluster(4, 4, 1, 0), not_waited);
    assert_found(cluster(4, 4, 2, 0), "nobody began");
    assert_found(cluster(4, 4, 3, 0), "at a cluster's barrier for others");
    assert_found(cluster(4, 4, 4, 0), "not aligned");
    assert_found(cluster(4, 4, 5, 0), "copies that nobody makes");
    assert_found(cluster(4, 4, 7, 0), "not an address in shared memory");
    assert_found(cluster(4, 4, 8, 0), "before it has left it");
    let wrong = |seed| cluster(4, 4, 6, seed).ok().is_none_or(|results| results != received(4, 4));
    assert!((0..8).any(wrong), "a copy that comes too early shows");
}

/// What each thread of each block read of the next.
fn ranks(blocks: u32, cluster: u32, error: i32, seed: u64) -> Result<Vec<f32>, LaunchError> {
    let results = Buffer::<f32>::unwritten(2 * 64 * blocks as usize);
    let launch = Launch { cluster, ..probe("probe_ranks", blocks, 64, 64 * 8) };
    shuffled(seed, || launch.run(&[(&results).into(), error.into()]))?;
    Ok(results.to_vec())
}

#[test]
fn blocks_of_a_cluster_read_each_other() -> Result<(), LaunchError> {
    for (blocks, size) in [(3, 1), (6, 2), (8, 4), (8, 8)] {
        let next = |block: u32| block / size * size + (block + 1) % size;
        let expected = (0..blocks).flat_map(|block| (0..64).flat_map(move |thread| [next(block), thread]));
        let expected: Vec<f32> = expected.map(|x| x as f32).collect();
        for seed in 0..4 {
            assert_eq!(ranks(blocks, size, 0, seed)?, expected, "{size} together");
        }
    }
    Ok(())
}

#[test]
fn errors_of_reading_each_other_are_found() {
    if SANITIZER == "thread" {
        assert_found(ranks(4, 4, 1, 0), BY_SANITIZER);
    } else {
        let nothing = |seed| ranks(4, 4, 1, seed).is_ok_and(|read| read.iter().any(|x| x.is_nan()));
        assert!((0..8).any(nothing), "a read that comes too early shows");
    }
    let ended =
        |seed| ranks(4, 4, 2, seed).is_err_and(|why| why.to_string().contains("a block that has ended"));
    assert!((1..9).any(ended), "a block that ends too early shows");
    assert_found(ranks(4, 4, 3, 0), "no block of a cluster has this rank");
    assert_found(ranks(4, 4, 4, 0), "not aligned");
    assert_found(ranks(4, 4, 5, 0), "not an address in shared memory");
}
