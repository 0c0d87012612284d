//! Tokens back to text, one at a time. Owns the bytes of a character that is not complete yet.

use super::Tokenizer;

/// Collects bytes and hands out whole characters.
#[derive(Clone, Debug, Default)]
pub(crate) struct Detokenizer {
    pending: Vec<u8>,
}

impl Detokenizer {
    /// The text that this token completes; it may be empty.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> String {
        self.push_bytes(&tokenizer.bytes(token))
    }

    fn push_bytes(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut used = 0;
        while let Some(rest) = self.pending.get(used..) {
            match std::str::from_utf8(rest) {
                Ok(good) => {
                    text.push_str(good);
                    used = self.pending.len();
                    break;
                }
                Err(error) => {
                    let good = rest.get(..error.valid_up_to()).unwrap_or_default();
                    text.push_str(&String::from_utf8_lossy(good));
                    used += good.len();
                    match error.error_len() {
                        // Not a character, and no further byte can make it one.
                        Some(length) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            used += length;
                        }
                        None => break,
                    }
                }
            }
        }
        self.pending.drain(..used);
        text
    }

    /// What is left at the end of a generation.
    pub(crate) fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_split_over_tokens_comes_out_whole() {
        let mut detokenizer = Detokenizer::default();
        let bytes = "aé€😀".as_bytes();
        let parts: Vec<String> = bytes
            .iter()
            .map(|byte| detokenizer.push_bytes(&[*byte]))
            .collect();
        assert_eq!(parts, ["a", "", "é", "", "", "€", "", "", "", "😀"]);
        assert_eq!(detokenizer.finish(), "");
    }

    #[test]
    fn bytes_that_are_no_character_become_the_replacement_mark_and_later_text_survives() {
        let mut detokenizer = Detokenizer::default();
        assert_eq!(detokenizer.push_bytes(&[0xff, b'a', 0xc3]), "\u{fffd}a");
        assert_eq!(detokenizer.push_bytes(b"b"), "\u{fffd}b");
        assert_eq!(detokenizer.push_bytes(&[0xe2, 0x82]), "");
        assert_eq!(detokenizer.finish(), "\u{fffd}");
    }
}
