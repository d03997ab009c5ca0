//! Replays what fuzzing has found worth keeping.

use std::{error::Error, fs, path::Path};

#[test]
fn committed_corpora_hold() -> Result<(), Box<dyn Error>> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus");
    for (name, target) in skein_fuzz_targets::TARGETS {
        let mut inputs = 0;
        for entry in fs::read_dir(corpus.join(name))? {
            let path = entry?.path();
            let data = fs::read(&path)?;
            let outcome = std::panic::catch_unwind(|| target(&data));
            assert!(outcome.is_ok(), "{name} does not hold on {}", path.display());
            inputs += 1;
        }
        assert!(inputs >= 10, "the corpus of {name} has {inputs} inputs");
    }
    Ok(())
}

#[test]
fn hostile_shapes_hold() {
    let shapes = [
        Vec::new(),
        vec![0; 1],
        vec![0xff; 40],
        vec![0x80; 64],
        [[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f].as_slice(), &[0; 32]].concat(),
        b"- ".repeat(4_000),
        b"[".repeat(10_000),
        vec![0x0a; 100_000],
    ];
    for (_, target) in skein_fuzz_targets::TARGETS {
        for shape in &shapes {
            target(shape);
            for len in 0..shape.len().min(80) {
                target(&shape[..len]);
            }
        }
    }
}
