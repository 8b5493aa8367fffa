"""What is decided on each pipeline of diffusers that is given a text: by what it is read, or why it is not."""

DECISIONS = {
    "its `encode_prompt` takes no prompt, only prompts of edits": """
        LEditsPPPipelineStableDiffusion LEditsPPPipelineStableDiffusionXL
    """,
    "read by the reader of U-Nets": """
        AltDiffusionImg2ImgPipeline AltDiffusionPipeline AudioLDM2Pipeline CycleDiffusionPipeline
        KolorsImg2ImgPipeline KolorsPAGPipeline KolorsPipeline
         LatentConsistencyModelImg2ImgPipeline LatentConsistencyModelPipeline
        StableDiffusionAdapterPipeline StableDiffusionAttendAndExcitePipeline
        StableDiffusionControlNetImg2ImgPipeline StableDiffusionControlNetInpaintPipeline
        StableDiffusionControlNetPAGInpaintPipeline StableDiffusionControlNetPAGPipeline
        StableDiffusionControlNetPipeline StableDiffusionControlNetXSPipeline StableDiffusionDepth2ImgPipeline
        StableDiffusionDiffEditPipeline StableDiffusionGLIGENPipeline StableDiffusionGLIGENTextImagePipeline
        StableDiffusionImg2ImgPipeline StableDiffusionInpaintPipeline StableDiffusionInpaintPipelineLegacy
        StableDiffusionInstructPix2PixPipeline StableDiffusionLDM3DPipeline
        StableDiffusionModelEditingPipeline StableDiffusionPAGImg2ImgPipeline
        StableDiffusionPAGInpaintPipeline StableDiffusionPAGPipeline StableDiffusionPanoramaPipeline
        StableDiffusionParadigmsPipeline StableDiffusionPipeline StableDiffusionPipelineSafe
        StableDiffusionPix2PixZeroPipeline StableDiffusionSAGPipeline StableDiffusionUpscalePipeline
        StableDiffusionXLAdapterPipeline StableDiffusionXLControlNetImg2ImgPipeline
        StableDiffusionXLControlNetInpaintPipeline StableDiffusionXLControlNetPAGImg2ImgPipeline
        StableDiffusionXLControlNetPAGPipeline StableDiffusionXLControlNetPipeline
        StableDiffusionXLControlNetUnionImg2ImgPipeline StableDiffusionXLControlNetUnionInpaintPipeline
        StableDiffusionXLControlNetUnionPipeline StableDiffusionXLControlNetXSPipeline
        StableDiffusionXLImg2ImgPipeline StableDiffusionXLInpaintPipeline
        StableDiffusionXLInstructPix2PixPipeline StableDiffusionXLPAGImg2ImgPipeline
        StableDiffusionXLPAGInpaintPipeline StableDiffusionXLPAGPipeline StableDiffusionXLPipeline
        StableUnCLIPImg2ImgPipeline StableUnCLIPPipeline
    """,
    "read by the reader of joint models": """
        FluxControlImg2ImgPipeline FluxControlInpaintPipeline FluxControlNetImg2ImgPipeline
        FluxControlNetInpaintPipeline FluxControlNetPipeline FluxControlPipeline FluxFillPipeline
        FluxImg2ImgPipeline FluxInpaintPipeline FluxKontextInpaintPipeline FluxKontextPipeline FluxPipeline
        QwenImageControlNetInpaintPipeline QwenImageControlNetPipeline QwenImageEditInpaintPipeline
        QwenImageEditPipeline QwenImageEditPlusPipeline QwenImageImg2ImgPipeline QwenImageInpaintPipeline
        QwenImageLayeredPipeline QwenImagePipeline StableDiffusion3ControlNetInpaintingPipeline
        StableDiffusion3ControlNetPipeline StableDiffusion3Img2ImgPipeline StableDiffusion3InpaintPipeline
        StableDiffusion3PAGImg2ImgPipeline StableDiffusion3PAGPipeline StableDiffusion3Pipeline
        VisualClozeGenerationPipeline VisualClozePipeline
    """,
    "read by the reader of transformers with cross-attention": """
        PixArtAlphaPipeline PixArtSigmaPAGPipeline PixArtSigmaPipeline SanaControlNetPipeline SanaPAGPipeline
        SanaPipeline
    """,
    "a U-Net of another kind; no reader knows it yet": """
        DreamLiteMobilePipeline DreamLitePipeline Kandinsky3Img2ImgPipeline Kandinsky3Pipeline
    """,
    "embeds its text inside its call, without `encode_prompt`": """
        LDMTextToImagePipeline SemanticStableDiffusionPipeline
    """,
    "has neither a U-Net nor a transformer as its denoiser (a prior, a decoder, or several in turn)": """
        DiffusionGemmaPipeline FluxPriorReduxPipeline KandinskyPriorPipeline KandinskyV22PriorEmb2EmbPipeline
        KandinskyV22PriorPipeline LLaDA2Pipeline ShapEImg2ImgPipeline ShapEPipeline
        StableCascadeCombinedPipeline StableCascadeDecoderPipeline StableCascadePriorPipeline
        UnCLIPImageVariationPipeline UnCLIPPipeline VersatileDiffusionDualGuidedPipeline
        VersatileDiffusionImageVariationPipeline VersatileDiffusionTextToImagePipeline
        WuerstchenCombinedPipeline WuerstchenDecoderPipeline WuerstchenPriorPipeline
    """,
    "its U-Net adds the text's keys to the image's own (added-kv attention); no reader knows it yet": """
        IFImg2ImgPipeline IFImg2ImgSuperResolutionPipeline IFInpaintingPipeline
        IFInpaintingSuperResolutionPipeline IFPipeline IFSuperResolutionPipeline KandinskyCombinedPipeline
        KandinskyImg2ImgCombinedPipeline KandinskyImg2ImgPipeline KandinskyInpaintCombinedPipeline
        KandinskyInpaintPipeline KandinskyPipeline KandinskyV22CombinedPipeline
        KandinskyV22ControlnetImg2ImgPipeline KandinskyV22ControlnetPipeline
        KandinskyV22Img2ImgCombinedPipeline KandinskyV22Img2ImgPipeline KandinskyV22InpaintCombinedPipeline
        KandinskyV22InpaintPipeline KandinskyV22Pipeline
    """,
    "its U-Net's attentions normalise their keys: the maps would not be DAAM's": """
        StableDiffusionLatentUpscalePipeline
    """,
    "its noise levels are of another schedule": """
        SanaSprintImg2ImgPipeline SanaSprintPipeline
    """,
    "its positions are of time, height and width (also where it makes one image), maps are of height and width": """
        AllegroPipeline AnyFlowFARPipeline AnyFlowPipeline ChronoEditPipeline CogVideoXFunControlPipeline
        CogVideoXImageToVideoPipeline CogVideoXPipeline CogVideoXVideoToVideoPipeline ConsisIDPipeline
        Cosmos2TextToImagePipeline Cosmos2VideoToWorldPipeline Cosmos2_5_PredictBasePipeline
        Cosmos2_5_TransferPipeline CosmosTextToWorldPipeline CosmosVideoToWorldPipeline
        EasyAnimateControlPipeline EasyAnimateInpaintPipeline EasyAnimatePipeline HeliosPipeline
        HeliosPyramidPipeline HunyuanSkyreelsImageToVideoPipeline HunyuanVideo15ImageToVideoPipeline
        HunyuanVideo15Pipeline HunyuanVideoFramepackPipeline HunyuanVideoImageToVideoPipeline
        HunyuanVideoPipeline JoyImageEditPipeline JoyImageEditPlusPipeline Kandinsky5I2IPipeline
        Kandinsky5I2VPipeline Kandinsky5T2IPipeline Kandinsky5T2VPipeline Kandinsky6TI2VAPipeline
        LTX2ConditionPipeline LTX2DFRPipeline LTX2DFRTemporalRefinePipeline LTX2HDRPipeline
        LTX2ImageToVideoPipeline LTX2InContextPipeline LTX2Pipeline LTXConditionPipeline
        LTXI2VLongMultiPromptPipeline LTXImageToVideoPipeline LTXPipeline LattePipeline LucyEditPipeline
        MochiPipeline MotifVideoImage2VideoPipeline MotifVideoPipeline SanaImageToVideoPipeline
        SanaVideoPipeline SanaWMPipeline SkyReelsV2DiffusionForcingImageToVideoPipeline
        SkyReelsV2DiffusionForcingPipeline SkyReelsV2DiffusionForcingVideoToVideoPipeline
        SkyReelsV2ImageToVideoPipeline SkyReelsV2Pipeline WanAnimatePipeline WanImageToVideoPipeline
        WanPipeline WanVACEPipeline WanVideoToVideoPipeline
    """,
    "its text's tokens stand among tokens of a subject's image": """
        BlipDiffusionControlNetPipeline BlipDiffusionPipeline
    """,
    "makes audio by a diffusion transformer, whose positions are of time alone; no reader knows it yet": """
        AceStepPipeline LongCatAudioDiTPipeline StableAudio3AudioToAudioPipeline StableAudio3InpaintPipeline
        StableAudio3Pipeline StableAudioPipeline
    """,
    "makes audio, and is given no text": """
        AudioDiffusionPipeline SpectrogramDiffusionPipeline
    """,
    "makes videos: a pass has many frames, maps are of one image": """
        AnimateDiffControlNetPipeline AnimateDiffPAGPipeline AnimateDiffPipeline AnimateDiffSDXLPipeline
        AnimateDiffSparseControlNetPipeline AnimateDiffVideoToVideoControlNetPipeline
        AnimateDiffVideoToVideoPipeline I2VGenXLPipeline PIAPipeline StableVideoDiffusionPipeline
        TextToVideoSDPipeline TextToVideoZeroPipeline TextToVideoZeroSDXLPipeline VideoToVideoSDPipeline
    """,
    "no reader knows its denoiser yet": """
        AmusedImg2ImgPipeline AmusedInpaintPipeline AmusedPipeline AuraFlowPipeline BriaFibo2Pipeline
        BriaFiboEditPipeline BriaFiboPipeline BriaPipeline ChromaImg2ImgPipeline ChromaInpaintPipeline
        ChromaPipeline CogView3PlusPipeline CogView4ControlPipeline CogView4Pipeline Cosmos3OmniPipeline
        ErnieImagePipeline Flux2KleinInpaintPipeline Flux2KleinKVPipeline Flux2KleinPipeline Flux2Pipeline
        GlmImagePipeline HiDreamImagePipeline HunyuanDiTControlNetPipeline HunyuanDiTPAGPipeline
        HunyuanDiTPipeline HunyuanImagePipeline HunyuanImageRefinerPipeline Ideogram4Pipeline Krea2Pipeline
        LongCatImageEditPipeline LongCatImagePipeline Lumina2Pipeline LuminaPipeline NucleusMoEImagePipeline
        OmniGenPipeline OvisImagePipeline PRXPipeline PRXPixelPipeline QwenImage21Pipeline
        RFD4ProteinaPipeline UniDiffuserPipeline VQDiffusionPipeline ZImageControlNetInpaintPipeline
        ZImageControlNetPipeline ZImageImg2ImgPipeline ZImageInpaintPipeline ZImageOmniPipeline ZImagePipeline
    """,
    "no text tokens: one CLAP vector of the whole text": """
        AudioLDMPipeline MusicLDMPipeline
    """,
    "no text: its U-Net reads CLIP vectors of an image": """
        PaintByExamplePipeline StableDiffusionImageVariationPipeline
    """,
    "runs by ONNX, without torch modules whose calls could be read": """
        OnnxStableDiffusionImg2ImgPipeline OnnxStableDiffusionInpaintPipeline
        OnnxStableDiffusionInpaintPipelineLegacy OnnxStableDiffusionPipeline
        OnnxStableDiffusionUpscalePipeline StableDiffusionOnnxPipeline
    """,
}
PIPELINES = {name: decision for decision, names in DECISIONS.items() for name in names.split()}
