//! Whatever is wrong: one line that names file, field and remedy, an exit code other than 0, and no output.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;

use common::{files, hiper, model, photo, replace_tensor, words, write_tail};

/// Runs the command and expects exit code 1, one line of error that has all of `parts`, and no output file.
fn fails(folder: &Path, line: &str, parts: &[&str]) {
    let run = hiper(folder, &words(&line.replace("PHOTO", photo().to_str().unwrap())));
    assert_eq!(run.code, Some(1), "{line}: {}", run.stderr);
    let errors: Vec<&str> = run.stderr.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{}", run.stderr);
    for part in parts {
        assert!(run.stderr.contains(part), "{line}: no {part:?} in\n{}", run.stderr);
    }
    assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    let left = files(&folder.join("out"));
    let run_files = ["settings.json", "log.jsonl"];
    assert!(left.iter().all(|file| run_files.contains(&file.as_str())), "{line} left {left:?}");
}

const PERSONALIZE: &str = "personalize --source-text 'a rabbit' --output-dir out --train-steps 2";

#[test]
fn damaged_checkpoints() {
    let unet = "unet/diffusion_pytorch_model.safetensors";
    type Damage = fn(&Path);
    let cases: [(&str, Damage, &[&str]); 8] = [
        (
            "a missing file",
            |m| std::fs::remove_file(m.join("vae/diffusion_pytorch_model.safetensors")).unwrap(),
            &["vae/diffusion_pytorch_model.safetensors", "not found"],
        ),
        (
            "a truncated file",
            |m| truncate(&m.join("unet/diffusion_pytorch_model.safetensors")),
            &["unet/diffusion_pytorch_model.safetensors", "truncated"],
        ),
        (
            "another shape",
            |m| {
                replace_tensor(
                    &m.join("unet/diffusion_pytorch_model.safetensors"),
                    "conv_out.bias",
                    &[5],
                    &[0.0; 5],
                )
            },
            &["unet/diffusion_pytorch_model.safetensors", "conv_out.bias", "[5]", "[8]"],
        ),
        (
            "NaN",
            |m| {
                replace_tensor(
                    &m.join("unet/diffusion_pytorch_model.safetensors"),
                    "conv_out.bias",
                    &[8],
                    &[f32::NAN; 8],
                )
            },
            &["unet/diffusion_pytorch_model.safetensors", "conv_out.bias", "NaN"],
        ),
        (
            "a loss that overflows",
            |m| {
                replace_tensor(
                    &m.join("unet/diffusion_pytorch_model.safetensors"),
                    "conv_out.bias",
                    &[8],
                    &[1e30; 8],
                )
            },
            &["step 1", "not finite"],
        ),
        (
            "an unknown block",
            |m| edit(&m.join("unet/config.json"), "\"DownBlock2D\"", "\"MadeUpBlock2D\""),
            &["model/unet/config.json", "down_block_types", "MadeUpBlock2D"],
        ),
        (
            "a config that is not JSON",
            |m| edit(&m.join("vae/config.json"), "{", "["),
            &["vae/config.json", "line"],
        ),
        (
            "no tokenizer",
            |m| std::fs::remove_dir_all(m.join("tokenizer")).unwrap(),
            &["tokenizer/vocab.json", "not found"],
        ),
    ];
    for (name, damage, parts) in cases {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path());
        assert!(model.join(unet).is_file());
        damage(&model);
        println!("{name}");
        fails(folder.path(), &format!("{PERSONALIZE} --input-image PHOTO --model model"), parts);
    }
}

fn truncate(file: &Path) {
    let bytes = std::fs::read(file).unwrap();
    std::fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
}

fn edit(file: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(file).unwrap();
    assert!(text.contains(from));
    std::fs::write(file, text.replacen(from, to, 1)).unwrap();
}

#[test]
fn what_is_no_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("model.ckpt"), b"x").unwrap();
    std::fs::create_dir(folder.path().join("empty")).unwrap();
    let line = |model: &str| format!("{PERSONALIZE} --input-image PHOTO --model {model}");
    fails(folder.path(), &line("model.ckpt"), &["model.ckpt", "single file"]);
    fails(folder.path(), &line("empty"), &["empty/unet/config.json", "not found"]);
    fails(folder.path(), &line("nowhere"), &["nowhere", "not found"]);
    fails(folder.path(), &line("some-org/some-model"), &["some-org/some-model", "hf download"]);
}

#[test]
fn photos_that_cannot_be_used() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("letter.png"), b"Dear reader").unwrap();
    std::fs::write(at("empty.png"), b"").unwrap();
    let whole = std::fs::read(photo()).unwrap();
    std::fs::write(at("cut.png"), &whole[..whole.len() / 2]).unwrap();
    image::RgbImage::new(1, 1).save(at("dot.png")).unwrap();
    image::GrayImage::new(16, 100_000).save(at("thread.png")).unwrap();
    std::fs::write(at("bomb.png"), header_of_a_huge_png()).unwrap();
    std::fs::write(at("huge.png"), huge_png(20_000)).unwrap();
    for (name, parts) in [
        ("letter.png", ["is not a picture of a known kind", "hint: give a PNG"]),
        ("empty.png", ["is not a picture of a known kind", "hint: give a PNG"]),
        ("cut.png", ["cannot be decoded", "hint: open it in another program"]),
        ("dot.png", ["1x1 pixels, too few", "at least 16 pixels"]),
        ("huge.png", ["20000x20000 pixels", "hint: scale it down"]),
        ("bomb.png", ["20000x20000 pixels", "hint: scale it down"]),
        ("none.png", ["cannot be read", "hint: check the path"]),
    ] {
        fails(folder.path(), &format!("{PERSONALIZE} --input-image {name}"), &[&[name], &parts[..]].concat());
        assert!(!at("out").exists());
    }
    fails(
        folder.path(),
        &format!("{PERSONALIZE} --input-image thread.png"),
        &["16x100000 is longer than 16 to 1", "hint: crop"],
    );
}

/// The beginning of a PNG that claims 16 bits a channel, and no pixels.
fn header_of_a_huge_png() -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, 20_000, 20_000);
    encoder.set_color(png::ColorType::Rgba);
    encoder.set_depth(png::BitDepth::Sixteen);
    encoder.write_header().unwrap().write_chunk(png::chunk::IDAT, b"").unwrap();
    bytes
}

/// A PNG of one colour whose pixels would take more than a gigabyte.
fn huge_png(side: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, side, side);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_compression(png::Compression::Fast);
    let mut writer = encoder.write_header().unwrap();
    let mut stream = writer.stream_writer().unwrap();
    let row = vec![90u8; side as usize * 3];
    (0..side).for_each(|_| std::io::Write::write_all(&mut stream, &row).unwrap());
    stream.finish().unwrap();
    drop(writer);
    bytes
}

#[test]
fn settings_that_do_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    let line = |flags: &str| format!("{PERSONALIZE} --input-image PHOTO {flags}");
    fails(
        folder.path(),
        &line("--resolution 70"),
        &["--resolution 70", "multiple of", "hint: try --resolution"],
    );
    fails(folder.path(), &line("--device cuda:1"), &["--device cuda", "not compiled in", "--device cpu"]);
    fails(folder.path(), &line("--device metal"), &["--device metal", "not compiled in"]);
    fails(folder.path(), &line("--dtype bf16"), &["--dtype bf16", "f32 only"]);
    let generate = "generate --prompt rabbit --output-dir out";
    fails(folder.path(), &format!("{generate} --height 4097"), &["--height 4097"]);
    fails(folder.path(), &format!("{generate} --steps 1000"), &["steps", "1 to 999"]);
    fails(folder.path(), &format!("{generate} --steps 1 --scheduler pndm"), &["at least 4 with pndm"]);
}

#[test]
fn tails_that_do_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    write_tail(&folder.path().join("wide.safetensors"), 5, 768);
    write_tail(&folder.path().join("long.safetensors"), 77, 128);
    std::fs::write(folder.path().join("letter.safetensors"), b"Dear reader").unwrap();
    std::fs::write(folder.path().join("letter.pt"), b"Dear reader").unwrap();
    for (name, parts) in [
        ("wide.safetensors", ["width 768", "hint: give --model"]),
        ("long.safetensors", ["long.safetensors: the tail has 77 tokens", "no room"]),
        ("letter.safetensors", ["letter.safetensors", "safetensors"]),
        ("letter.pt", ["letter.pt", "hiper_embeddings_step*.pt"]),
        ("none.safetensors", ["none.safetensors", "hint: check the path"]),
    ] {
        fails(folder.path(), &format!("edit --embedding {name} --prompt rabbit --output-dir out"), &parts);
    }
}

#[test]
fn output_folders_that_cannot_be_written() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("file"), b"in the way").unwrap();
    for out in ["file", "file/below", "/proc/hiper"] {
        let line = format!(
            "personalize --source-text rabbit --train-steps 1 --input-image PHOTO --output-dir {out}"
        );
        fails(folder.path(), &line, &[out, "output folder"]);
    }
}

/// A file size limit stands for a full disk: it needs no rights, and writes fail half-way just the same.
#[cfg(unix)]
#[test]
fn a_full_disk() {
    let limited = |folder: &Path, blocks: usize, line: &str| {
        let shell = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
        let mut command = std::process::Command::new("sh");
        command.args(["-c", &shell, env!("CARGO_BIN_EXE_hiper")]).args(words(line)).current_dir(folder);
        common::run(&mut command)
    };
    let folder = tempfile::tempdir().unwrap();
    let line = format!("{PERSONALIZE} --input-image {} --checkpoint-every 1", photo().display());
    let run = limited(folder.path(), 2, &line);
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    assert!(run.stderr.contains("hiper_step1.safetensors: cannot write"), "{}", run.stderr);
    assert!(run.stderr.contains("hint: free some space"), "{}", run.stderr);
    assert_eq!(files(&folder.path().join("out")), ["log.jsonl", "settings.json"]);
    // With space again, the same command goes on.
    assert_eq!(hiper(folder.path(), &words(&format!("{line} --resume"))).code, Some(0));
}
