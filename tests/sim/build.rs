//! Exports the program's own `getrandom`, so that libraries which look it up at run time find it (see `src/entropy.rs`).

fn main() {
    println!("cargo::rustc-link-arg=-rdynamic");
}
